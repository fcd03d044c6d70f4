"""Precision: weights that are kept in one dtype while steps compute in another."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from runtime.parallel.sharding import Weights


@dataclass(frozen=True, slots=True)
class Precision:
    """What a transformer's weights are kept in, and what its steps compute in.

    Attributes:
        kept: dtype of the weights.
        computed: dtype of the steps.
        exempt: names of modules and parameters that are in float32 whatever steps compute in, such as norms.
    """

    kept: torch.dtype
    computed: torch.dtype
    exempt: Collection[str] = field(default_factory=frozenset)

    def convert(self, model: nn.Module, blocks: Sequence[nn.Module]) -> None:
        """Bring all that is in no block to what steps compute in, for good: it is little."""
        if self.kept == self.computed:
            return
        inside = {id(module) for block in blocks for module in block.modules()}
        for name, module in model.named_modules():
            if id(module) not in inside:
                self._convert(name, module)

    def visiting(self, weights: Weights) -> Weights:
        """`weights` whose blocks are in what steps compute in while they are visited, and only then."""
        return weights if self.kept == self.computed else _CastWeights(weights, self)

    @contextmanager
    def computing(self, block: nn.Module) -> Iterator[None]:
        """A block's weights in what steps compute in, while the `with` block runs."""
        kept = [(module, self._convert(name, module)) for name, module in block.named_modules()]
        try:
            yield
        finally:
            for module, parameters in kept:
                module._parameters.update(parameters)

    def _convert(self, name: str, module: nn.Module) -> dict[str, nn.Parameter]:
        """Convert a module's own parameters, not those of its parts; what they were."""
        changed = {}
        for leaf, parameter in module._parameters.items():
            exempt = any(part in self.exempt for part in (*name.split("."), leaf))
            wanted = torch.float32 if exempt else self.computed
            if parameter is not None and parameter.dtype == self.kept != wanted:
                changed[leaf] = parameter
                module._parameters[leaf] = nn.Parameter(parameter.to(wanted), requires_grad=False)
        return changed


class _CastWeights:
    """See `Precision.visiting`. One block at a time is there in both dtypes."""

    def __init__(self, weights: Weights, precision: Precision):
        self._weights, self._precision = weights, precision

    def visit(self, blocks: Sequence[nn.Module]) -> Iterator[nn.Module]:
        for block in self._weights.visit(blocks):
            with self._precision.computing(block):
                yield block
