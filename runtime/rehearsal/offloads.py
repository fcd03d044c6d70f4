"""Fake offloading: that of `runtime.parallel.offloading`, with fake memory that is counted as weights."""

from __future__ import annotations

import torch

from runtime.parallel.offloading import Block, Leaf, Offload, Place
from runtime.rehearsal.ledger import Ledger


class FakeOffload(Offload):
    """Offloaded blocks on a fake device; make and use it within `FakeDevice.running`.

    Args:
        ledger: ledger of the memory that they hold.
        device, places: see `Offload`.
    """

    def __init__(self, ledger: Ledger, device: torch.device, places: int | None = None):
        super().__init__(device, places)
        self._ledger = ledger

    def _moved(self, leaves: list[Leaf], size: int, place: Place) -> Block:
        for leaf in leaves:
            self._ledger.set_aside(leaf.table[leaf.name])
        return _FakeBlock(leaves, torch.empty(size, dtype=torch.uint8), place)

    def _room(self, size: int) -> torch.Tensor:
        with self._ledger.as_weights():
            return torch.empty(size, dtype=torch.uint8, device=self._device)


class _FakeBlock(Block):
    """A block that keeps its fake weights all the time: they are counted as part of its place's memory."""

    def __init__(self, leaves: list[Leaf], memory: torch.Tensor, place: Place):
        self.memory, self.place = memory, place
        self.at_home = [leaf.table[leaf.name] for leaf in leaves]

    def go(self) -> None:
        pass

    def come_home(self) -> None:
        pass
