"""Colours of latents: the linear map from latent channels to RGB that comes closest to what a VAE decodes.

A pixel of it stands for a whole area: the pixels, in space and time, that a VAE makes of one latent place.

Tensor legend: B batch, N places in latents, C latent channels, F latent frames, T frames, H, W height and
width, 3 colours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, ValidationError

_RIDGE = 1e-3  # of the channels' mean square, which is about 1: latents are normalised


class _Kept(BaseModel):
    """`LatentColours` as JSON."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    weights: list[tuple[float, float, float]]
    bias: tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class LatentColours:
    """Linear map from normalised latents to RGB.

    Attributes:
        weights_C3, bias_3: float32; RGB in [0, 1] = latents · weights + bias.
    """

    weights_C3: torch.Tensor
    bias_3: torch.Tensor

    def to(self, device: torch.device) -> LatentColours:
        """Copy the map to a device."""
        return LatentColours(self.weights_C3.to(device), self.bias_3.to(device))

    def rgb(self, latents_BCFHW: torch.Tensor) -> torch.Tensor:
        """Return the colours `[B, F, H, W, 3]` in [0, 1] of latents in float32 on the map's device."""
        colours_BFHW3 = torch.einsum("bcfhw,cd->bfhwd", latents_BCFHW, self.weights_C3) + self.bias_3
        return colours_BFHW3.clamp(0, 1)

    @property
    def finite(self) -> bool:
        """True if the map holds no NaN or infinity; it does if the VAE overflows."""
        return bool(self.weights_C3.isfinite().all() and self.bias_3.isfinite().all())

    def to_json(self) -> str:
        """Serialise the map for `from_json`."""
        content = {"weights": self.weights_C3.tolist(), "bias": self.bias_3.tolist()}
        return _Kept.model_validate(content).model_dump_json()

    @classmethod
    def from_json(cls, text: str, channels: int) -> LatentColours | None:
        """Read what `to_json` wrote; None if it is damaged, or of another number of channels."""
        try:
            kept = _Kept.model_validate_json(text)
        except ValidationError:
            return None
        if len(kept.weights) != channels:
            return None
        return cls(torch.tensor(kept.weights), torch.tensor(kept.bias))


def fit_colours(latents_BCFHW: torch.Tensor, frames_BTHW3: torch.Tensor) -> LatentColours:
    """Fit the map to latents and what a causal video VAE decodes them to, by weighted least squares.

    A place counts the more, the more typical it is: its weight is (1 + q)⁻², where q is its mean square over
    the channels, which is 1 on average over what the VAE was trained on. Otherwise clips of a kind that the
    VAE has never seen would decide, as their latents lie far out, where it is least linear.

    Args:
        latents_BCFHW: normalised latents, on any device, in any dtype.
        frames_BTHW3: their frames in [0, 1]: one for the first latent frame, and equally many for each other.
    """
    latents_NC = latents_BCFHW.permute(0, 2, 3, 4, 1).flatten(0, 3).double().cpu()
    colours_N3 = areas(frames_BTHW3, latents_BCFHW.shape[2:]).flatten(0, 3).double().cpu()
    channels = latents_NC.shape[1]
    shares_N1 = (1 + latents_NC.square().mean(1, keepdim=True)) ** -2
    shares_N1 /= shares_N1.sum()
    inputs = torch.cat([latents_NC, torch.ones_like(shares_N1)], dim=1)
    ridge = torch.diag(torch.tensor([_RIDGE] * channels + [0.0], dtype=torch.float64))
    solved = torch.linalg.solve(inputs.T @ (shares_N1 * inputs) + ridge, inputs.T @ (shares_N1 * colours_N3))
    return LatentColours(solved[:-1].float(), solved[-1].float())


def areas(frames_BTHW3: torch.Tensor, places: torch.Size | tuple[int, int, int]) -> torch.Tensor:
    """Return the mean colour `[B, F, H, W, 3]` of the area that each place of the latents stands for.

    Args:
        frames_BTHW3: what a causal video VAE decoded.
        places: F, H and W of the latents.
    """
    frames_BT3HW = frames_BTHW3.movedim(-1, 2).float()
    small_BT3HW = F.adaptive_avg_pool3d(frames_BT3HW, (3, *places[1:]))  # colours stand where depth is
    first, later = small_BT3HW[:, :1], small_BT3HW[:, 1:]
    if places[0] > 1:
        later = torch.stack(later.chunk(places[0] - 1, dim=1)).mean(2).movedim(0, 1)
    return torch.cat([first, later], dim=1).movedim(2, -1)
