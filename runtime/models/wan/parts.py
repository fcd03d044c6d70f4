"""Parts of frames that the VAE decodes, and which rank decodes them.

Tensor legend: B batch, C latent channels, F latent frames, H, W latent height and width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final, Literal

import torch
from diffusers import AutoencoderKLWan

from runtime.request.config import Config, Tiles

HALO: Final = "halo"
Parts = Tiles | Literal["halo"] | None
"""Tiles that the ranks share, a strip of every frame for each rank, or None for the first rank's frames."""

_ACTIVATIONS = 16  # largest activations that a decoder holds at a time, at most


def choose_parts(config: Config, world: int, fits: Callable[[], bool]) -> Parts:
    """Choose what `world` ranks decode.

    `auto` takes strips on several ranks, as they need the least time and memory. A single rank decodes whole
    frames, in less time than tiles, or tiles if those do not fit.

    Args:
        config: says what to decode.
        world: number of ranks.
        fits: returns whether a single rank's device has room for whole frames.
    """
    decoding = config.decoding
    if decoding == "auto":
        decoding = "halo" if world > 1 else "whole" if fits() else "tiles"
    if decoding == "tiles":
        return config.tiles or Tiles()
    return HALO if decoding == "halo" and world > 1 else None


def name_of(parts: Parts) -> str:
    """Name parts for messages."""
    return "whole frames" if parts is None else "strips" if parts == HALO else "tiles"


def on_every_rank(config: Config, world: int) -> bool:
    """Return whether each of `world` ranks has a strip of every frame, also of frames that are encoded."""
    return world > 1 and config.decoding in ("halo", "auto")


def bytes_of_whole(vae: AutoencoderKLWan, latents_BCFHW: torch.Tensor) -> int:
    """Most bytes that decoding whole frames takes beside the weights, estimated.

    These are some tensors as the decoder's last block takes them, of all pixels of one latent frame.
    """
    settings, (batch, *_, height, width) = vae.config, latents_BCFHW.shape
    scale = vae.spatial_compression_ratio // (settings.patch_size or 1)
    channels = (settings.decoder_base_dim or settings.base_dim) * (2 if settings.is_residual else 1)
    shape = (batch, channels, settings.scale_factor_temporal, height * scale, width * scale)
    return int(_ACTIVATIONS * math.prod(shape) * vae.dtype.itemsize)
