"""Blending of values of overlapping windows into those of the whole video."""

from __future__ import annotations

import torch

from runtime.request.windows import Windows


class Blender:
    """Adds up values of windows, weighted where windows overlap.

    Args:
        windows: the windows' places in the video.
    """

    def __init__(self, windows: Windows):
        self._windows, self._weights = windows, windows.weights()

    def add(self, number: int, value_BCFHW: torch.Tensor, total_BCFHW: torch.Tensor) -> None:
        """Add a value `[B, C, F, H, W]` of window `number` to the total of the whole video."""
        if self._weights[0].device != total_BCFHW.device:  # once, as copies to a device block
            self._weights = [share.to(total_BCFHW.device) for share in self._weights]
        total_BCFHW[:, :, self._windows.slice(number)] += self._weights[number].view(-1, 1, 1) * value_BCFHW
