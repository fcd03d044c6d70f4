"""Probing: what is kept of a run's tensors, and how a run is disturbed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from spectrum.calibrated import Gram

_SAMPLED = 2**23  # numbers per value
_CHUNK = 2**18  # numbers per value that are multiplied at a time, in float64
_NUDGE = 0.5  # size, relative to the velocity's change since the step before


def sample(value: torch.Tensor) -> torch.Tensor:
    """Sample at most 2²³ numbers of a tensor, evenly spread, on the host."""
    flat = value.reshape(-1)
    stride = -(-flat.numel() // _SAMPLED)
    return flat[::stride].to("cpu", copy=True)


def gram_of(values: Sequence[torch.Tensor]) -> Gram:
    """Compute the Gram matrix `[n, n]` of n vectors, in float64."""
    gram = np.zeros((len(values), len(values)))
    for start in range(0, values[0].numel(), _CHUNK):
        part = torch.stack([value[start : start + _CHUNK] for value in values]).double()
        gram += (part @ part.T).numpy()
    return gram


def nudge(velocity: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """Disturbance of a step's velocity along its own change since the step before, as a forecast is off."""
    return _NUDGE * (velocity - before)


def norm(value: torch.Tensor) -> float:
    """Euclidean norm, in float64; waits for the device."""
    return float(value.double().norm())
