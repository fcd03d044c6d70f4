"""Colours of a Wan VAE's latents: fitted at first use on drawn clips, and cached.

Tensor legend: N clips, T frames, C latent channels, F latent frames, H, W height and width, 3 colours.
"""

from __future__ import annotations

import logging
import time

import torch
from diffusers import AutoencoderKLWan

from runtime.files.cache import CachedFile
from runtime.models.clips import draw_clips
from runtime.models.colours import LatentColours, fit_colours
from runtime.models.folder import ModelFolder, folder_digest
from runtime.models.wan.vae import WanDecoder, decode_frames

log = logging.getLogger(__name__)

_CLIPS, _FRAMES, _SIZE = 16, 5, 64  # 4.7 TFLOP with the VAE of Wan2.1; more clips give no better map
_AT_ONCE = 8  # clips
_VERSION = 1  # of what the map is fitted to


class WanColours:
    """The colours of a VAE's latents, on the rank that has it.

    Args:
        folder: the model, whose VAE's files name what is kept.
        decoder: has the VAE.
    """

    def __init__(self, folder: ModelFolder, decoder: WanDecoder):
        self._folder, self._decoder = folder, decoder
        self._known: LatentColours | None = None

    def __call__(self) -> LatentColours:
        """Return the map: of an earlier generation, from the user's cache folder, or fitted now."""
        if self._known is None:
            self._known = self._find()
        return self._known

    def _find(self) -> LatentColours:
        with self._decoder.at_work() as vae:
            assert vae is not None
            digest = folder_digest(self._folder.path / "vae").partition(":")[2]
            dtype = str(vae.dtype).removeprefix("torch.")
            kept = CachedFile(f"colours/{digest}-{dtype}-{_VERSION}.json")
            text = kept.read()
            known = None if text is None else LatentColours.from_json(text, vae.config.z_dim)
            if known is None:
                started = time.perf_counter()
                known = fit_vae(vae)
                log.info("fitted the colours of previews in %.1f s", time.perf_counter() - started)
                if known.finite:
                    kept.write(known.to_json())
            return known


@torch.no_grad()
def fit_vae(vae: AutoencoderKLWan) -> LatentColours:
    """Fit the map from latents to colours on drawn clips, which the VAE encodes and decodes."""
    latents, frames = [], []
    for clips_N3THW in torch.split(draw_clips(_CLIPS, _FRAMES, _SIZE), _AT_ONCE):
        latents.append(encode(vae, clips_N3THW))
        frames.append(torch.cat(list(decode_frames(vae, latents[-1])), dim=1))
    return fit_colours(torch.cat(latents), torch.cat(frames))


def encode(vae: AutoencoderKLWan, clips_N3THW: torch.Tensor) -> torch.Tensor:
    """Clips in [0, 1] → normalised latents `[N, C, F, H, W]`, on the VAE's device and in its dtype."""
    encoded: torch.Tensor = vae.encode((clips_N3THW * 2 - 1).to(vae.device, vae.dtype)).latent_dist.mode()
    per_channel = (1, vae.config.z_dim, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean).view(per_channel).to(encoded)
    std = torch.tensor(vae.config.latents_std).view(per_channel).to(encoded)
    return (encoded - mean) / std
