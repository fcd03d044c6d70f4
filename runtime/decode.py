"""VAE decode as a stream of frames: only one chunk of the video is alive at a time.

Tensor legend: B batch, C latent channels, F latent frames, T pixel frames of one chunk, H, W height and
width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify


@torch.no_grad()
def decode_frames(vae: AutoencoderKLWan, latents_BCFHW: torch.Tensor) -> Iterator[torch.Tensor]:
    """Decode normalised latents into frames, in temporal order.

    The concatenation along time is bit-equal to what `WanPipeline` returns for the same latents.

    Args:
        vae: a Wan VAE; in use until the iterator is exhausted or closed.
        latents_BCFHW: what the sampler left, normalised per channel, in any dtype.

    Yields:
        Frames `[B, T, H, W, 3]` in [0, 1], in the VAE's dtype; T is 1 first, then the VAE's temporal factor.
    """
    latents = latents_BCFHW.to(vae.device, vae.dtype)
    per_channel = (1, vae.config.z_dim, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean).view(per_channel).to(latents)
    inverse_std = 1.0 / torch.tensor(vae.config.latents_std).view(per_channel).to(latents)
    for chunk_B3THW in decode_chunks(vae, latents / inverse_std + mean):
        pixels = (chunk_B3THW.clamp(-1.0, 1.0) * 0.5 + 0.5).clamp(0.0, 1.0)
        yield pixels.permute(0, 2, 3, 4, 1)


def decode_chunks(vae: AutoencoderKLWan, latents_BCFHW: torch.Tensor) -> Iterator[torch.Tensor]:
    """Decode one latent frame at a time through the VAE's causal feature cache.

    The concatenation of the chunks along time is what `AutoencoderKLWan._decode` computes before it clamps.

    Args:
        vae: a Wan VAE. Its feature cache is in use until the iterator is exhausted or closed.
        latents_BCFHW: latents in the VAE's own scale (not normalised), on its device and in its dtype.

    Yields:
        Unclamped pixels `[B, 3, T, H, W]`, nominally in [-1, 1].
    """
    vae.clear_cache()
    try:
        hidden = vae.post_quant_conv(latents_BCFHW)
        for frame in range(hidden.shape[2]):
            vae._conv_idx = [0]
            chunk = vae.decoder(
                hidden[:, :, frame : frame + 1],
                feat_cache=vae._feat_map,
                feat_idx=vae._conv_idx,
                first_chunk=frame == 0,
            )
            if vae.config.patch_size is not None:
                chunk = unpatchify(chunk, patch_size=vae.config.patch_size)
            yield chunk
    finally:
        vae.clear_cache()
