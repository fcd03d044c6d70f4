"""The clean estimate: what the latents would become if the velocity stayed as it is.

Tensor legend: B batch, C latent channels, F latent frames, H, W latent height and width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Estimate:
    """Clean estimate of one computed step, the same on every rank; nothing is computed until it is asked for.

    Attributes:
        latents_BCFHW: latents before the step, float32.
        velocity_BCFHW: guided velocity of the step.
        noise: share σ of noise in the latents, 1 … 0: they are (1 − σ) · clean + σ · noise.
    """

    latents_BCFHW: torch.Tensor
    velocity_BCFHW: torch.Tensor
    noise: float

    @property
    def frames(self) -> int:
        """Number of latent frames."""
        return self.latents_BCFHW.shape[2]

    def clean(self, every: int = 1) -> torch.Tensor:
        """Compute x₀ = x − σ · v, in float32, of every `every`-th latent frame."""
        x_BCFHW, v_BCFHW = self.latents_BCFHW[:, :, ::every], self.velocity_BCFHW[:, :, ::every]
        return torch.sub(x_BCFHW, v_BCFHW.to(x_BCFHW.dtype), alpha=self.noise)


OnEstimate = Callable[[Estimate], None]
"""Told after every computed step, on every rank that cares."""


def unseen(estimate: Estimate) -> None:
    """Ignore an estimate: for runs without previews."""
