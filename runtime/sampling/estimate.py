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
        known_BCFHW: latents of the first frames, where those are known.
    """

    latents_BCFHW: torch.Tensor
    velocity_BCFHW: torch.Tensor
    noise: float
    known_BCFHW: torch.Tensor | None = None

    @property
    def frames(self) -> int:
        """Number of latent frames."""
        return self.latents_BCFHW.shape[2]

    def clean(self, every: int = 1) -> torch.Tensor:
        """Compute x₀ = x − σ · v, in float32, of every `every`-th latent frame."""
        x_BCFHW, v_BCFHW = self.latents_BCFHW[:, :, ::every], self.velocity_BCFHW[:, :, ::every]
        clean_BCFHW = torch.sub(x_BCFHW, v_BCFHW.to(x_BCFHW.dtype), alpha=self.noise)
        if self.known_BCFHW is None:
            return clean_BCFHW
        return with_known(clean_BCFHW, self.known_BCFHW[:, :, ::every])


def with_known(latents_BCFHW: torch.Tensor, known_BCFHW: torch.Tensor) -> torch.Tensor:
    """Put latents of known frames in the place of the first ones; nothing is written to the arguments."""
    known_BCFHW = known_BCFHW.to(latents_BCFHW.dtype)
    return torch.cat([known_BCFHW, latents_BCFHW[:, :, known_BCFHW.shape[2] :]], dim=2)


OnEstimate = Callable[[Estimate], None]
"""Told after every computed step, on every rank that cares."""


def unseen(estimate: Estimate) -> None:
    """Ignore an estimate: for runs without previews."""
