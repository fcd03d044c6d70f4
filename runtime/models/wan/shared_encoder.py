"""The VAE's encoder on all ranks: each encodes a strip of the frames that the first rank has.

Tensor legend: B batch, T frames, H, W height and width, 3 colours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import patchify
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput

from runtime.models.wan.halo import on_strips
from runtime.parallel.collectives import Peers
from runtime.parallel.ranks import Ranks
from runtime.parallel.strips import Strips

_CHUNK = 4  # frames after the first that are encoded at a time, as `AutoencoderKLWan._encode` does


class SharedEncoder:
    """A VAE as diffusers' pipelines call it on the first rank; it encodes on the strips of all ranks.

    Args:
        vae: this rank's VAE.
        ranks: the ranks.
    """

    def __init__(self, vae: AutoencoderKLWan, ranks: Ranks):
        self._vae, self._ranks = vae, ranks

    def __getattr__(self, name: str) -> Any:
        return getattr(self._vae, name)

    def run(self, task: Callable[[SharedEncoder], None]) -> None:
        """Run a task, which may encode any number of videos, on the first rank; the others help to encode."""
        if self._ranks.is_leader:
            task(self)
            self._tell([])
            return
        while shape := self._tell([]):
            self._encode(None, shape)

    def encode(self, pixels_B3THW: torch.Tensor) -> AutoencoderKLOutput:
        """As `AutoencoderKLWan.encode`, on the first rank, within `run`."""
        moments = self._encode(pixels_B3THW, self._tell(list(pixels_B3THW.shape)))
        assert moments is not None
        return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(moments))

    def _tell(self, shape: list[int]) -> list[int]:
        """Hear from the first rank the shape that is encoded next; an empty one at the end."""
        told: list[int] = self._ranks.control.all_gather_object(shape)[0]
        return told

    def _encode(self, pixels_B3THW: torch.Tensor | None, shape: Sequence[int]) -> torch.Tensor | None:
        peers = self._ranks.leading(shape[3] // self._vae.spatial_compression_ratio)
        return None if peers is None else encode_strips(self._vae, pixels_B3THW, shape, peers)


def encode_strips(
    vae: AutoencoderKLWan, pixels_B3THW: torch.Tensor | None, shape: Sequence[int], peers: Peers
) -> torch.Tensor | None:
    """Encode a video of the first rank on strips, to what `AutoencoderKLWan._encode` gives but for rounding.

    Args:
        vae: a Wan VAE.
        pixels_B3THW: the video, in the VAE's dtype and on its device; not used on other ranks than the first.
        shape: its shape.
        peers: the ranks, at most as many as rows of latents; all of them call this function.

    Returns:
        Parameters of the latents' distribution on the first rank; None on the others.
    """
    batch, colours, frames, height, width = shape
    strips = Strips(height // vae.spatial_compression_ratio, peers)
    cache: list[Any] = [None] * vae._cached_conv_counts["encoder"]
    starts, encoded = [0, *range(1, frames - _CHUNK + 1, _CHUNK)], []
    with on_strips(vae.encoder, strips):
        for start in starts:
            length = _CHUNK if start else 1
            chunk = None if pixels_B3THW is None else pixels_B3THW[:, :, start : start + length]
            of_chunk = (batch, colours, length, height, width)
            own = strips.deal(chunk, of_chunk, vae.quant_conv.weight)
            if vae.config.patch_size is not None:
                own = patchify(own, patch_size=vae.config.patch_size)
            encoded.append(vae.encoder(own, feat_cache=cache, feat_idx=[0]))
    return strips.collect(vae.quant_conv(torch.cat(encoded, dim=2)))
