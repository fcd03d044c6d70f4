"""Fake offloading: that of `runtime.parallel.offloading`, with fake memory that is counted as weights."""

from __future__ import annotations

import torch

from runtime.parallel.offloading import Offload
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

    def _host(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def _room(self, size: int) -> torch.Tensor:
        with self._ledger.as_weights():
            return torch.empty(size, dtype=torch.uint8, device=self._device)
