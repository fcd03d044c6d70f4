"""Fake experts that take turns on the device; bytes equal those of `runtime.parallel.swapping`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from runtime.rehearsal.fake import DEVICE
from runtime.rehearsal.ledger import Ledger


class FakeSwap:
    """Fake weights of blocks, which change places with those of another transformer when they are visited.

    Args:
        ledger: ledger of the memory that they hold.
    """

    def __init__(self, ledger: Ledger):
        self._ledger = ledger
        self._places: dict[nn.Module, int] = {}
        self._present: list[nn.Module] = []

    def add(self, block: nn.Module, place: int) -> None:
        """Take in a block that is on the device; a second one at a place leaves it."""
        self._places[block] = place
        if place == len(self._present):
            self._present.append(block)
            return
        for module, leaf in _leaves(block):
            _let_go(module, leaf)

    def visit(self, blocks: Sequence[nn.Module]) -> Iterator[nn.Module]:
        for block in blocks:
            place = self._places[block]
            leaving, self._present[place] = self._present[place], block
            if leaving is not block:
                for outgoing, incoming in zip(_leaves(leaving), _leaves(block), strict=True):
                    self._arrive(*incoming)
                    _let_go(*outgoing)
            yield block

    def write(self, block: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
        raise NotImplementedError("a rehearsal has no weights to write")

    def _arrive(self, module: nn.Module, leaf: str) -> None:
        away = module._parameters[leaf]
        assert away is not None
        with self._ledger.as_weights():
            arrived = torch.empty(away.shape, dtype=away.dtype, device=DEVICE)
        module._parameters[leaf] = nn.Parameter(arrived, requires_grad=False)


def _leaves(block: nn.Module) -> list[tuple[nn.Module, str]]:
    """List where the block's parameters are."""
    return [
        (module, leaf)
        for module in block.modules()
        for leaf, weight in module._parameters.items()
        if weight is not None
    ]


def _let_go(module: nn.Module, leaf: str) -> None:
    weight = module._parameters[leaf]
    assert weight is not None
    gone = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
    module._parameters[leaf] = nn.Parameter(gone, requires_grad=False)
