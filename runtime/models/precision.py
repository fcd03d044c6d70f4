"""Precision: storage dtype of weights and compute dtype of steps."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from runtime.parallel.sharding import Weights


@dataclass(frozen=True, slots=True)
class Precision:
    """Storage dtype of a transformer's weights, and compute dtype of its steps.

    Attributes:
        kept: storage dtype of the weights.
        computed: compute dtype of the steps.
        exempt: names of modules and parameters that stay in float32, such as norms.
    """

    kept: torch.dtype
    computed: torch.dtype
    exempt: Collection[str] = field(default_factory=frozenset)

    def convert(self, model: nn.Module, blocks: Sequence[nn.Module]) -> None:
        """Convert all weights outside the blocks to the compute dtype for good: they are few."""
        if self.kept == self.computed:
            return
        inside = {id(module) for block in blocks for module in block.modules()}
        for name, module in model.named_modules():
            if id(module) not in inside:
                self._convert(name, module)

    def visiting(self, weights: Weights) -> Weights:
        """Wrap `weights` so that a block is in the compute dtype while it is visited, and only then."""
        return weights if self.kept == self.computed else _CastWeights(weights, self)

    @contextmanager
    def computing(self, block: nn.Module) -> Iterator[None]:
        """Hold a block's weights in the compute dtype within the context."""
        kept = [(module, self._convert(name, module)) for name, module in block.named_modules()]
        try:
            yield
        finally:
            for module, parameters in kept:
                module._parameters.update(parameters)

    def _convert(self, name: str, module: nn.Module) -> dict[str, nn.Parameter]:
        """Convert a module's own parameters, without its submodules'; return the replaced ones by name."""
        changed = {}
        for leaf, parameter in module._parameters.items():
            exempt = any(part in self.exempt for part in (*name.split("."), leaf))
            wanted = torch.float32 if exempt else self.computed
            if parameter is not None and parameter.dtype == self.kept != wanted:
                changed[leaf] = parameter
                module._parameters[leaf] = nn.Parameter(parameter.to(wanted), requires_grad=False)
        return changed


class _CastWeights:
    """Weights that are cast while they are visited; see `Precision.visiting`. One block is held twice."""

    def __init__(self, weights: Weights, precision: Precision):
        self._weights, self._precision = weights, precision

    def visit(self, blocks: Sequence[nn.Module]) -> Iterator[nn.Module]:
        for block in self._weights.visit(blocks):
            with self._precision.computing(block):
                yield block

    def expect(self, blocks: Sequence[nn.Module]) -> None:
        self._weights.expect(blocks)

    def write(self, block: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
        self._weights.write(block, weights)
