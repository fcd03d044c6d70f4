"""Image conditioning: what an image says to an image-to-video transformer, encoded on the first rank only.

Tensor legend: B batch, I image tokens, E image encoder channels, C latent channels with a mask before them, F
latent frames, H, W latent height and width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from diffusers import AutoencoderKLWan
from PIL import Image

from runtime.configs import Config
from runtime.ranks import Ranks
from runtime.request import VideoRequest
from runtime.weights import ModelFolder

if TYPE_CHECKING:
    from diffusers import WanImageToVideoPipeline


@dataclass(frozen=True, slots=True)
class ImageCondition:
    """What a window is conditioned on, beside its text.

    Attributes:
        tokens_BIE: of the image encoder; the blocks attend to them, too.
        latents_BCFHW: goes into the transformer beside the noisy latents, float32: a mask of as many channels
            as a latent frame has frames, 1 where the frame is known, and the latents of what is known, with
            the latents of nothing behind them.
    """

    tokens_BIE: torch.Tensor
    latents_BCFHW: torch.Tensor

    def going_on_from(self, tail_BCFHW: torch.Tensor) -> torch.Tensor:
        """The `latents_BCFHW` of a window that begins with these latent frames of the one before.

        They are taken as they are: nothing is decoded and encoded again, so colours do not shift.
        """
        latents = self.latents_BCFHW.clone()
        mask = latents.shape[1] - tail_BCFHW.shape[1]
        latents[:, :mask, : tail_BCFHW.shape[2]] = 1.0
        latents[:, mask:, : tail_BCFHW.shape[2]] = tail_BCFHW
        return latents


class ImageEncoder:
    """Encodes images for one rank group. The image encoder is loaded for each image, and freed.

    Args:
        dtype: of the tokens, the transformer's.

    Source: `diffusers.WanImageToVideoPipeline`, which does the encoding.
    """

    def __init__(self, folder: ModelFolder, config: Config, ranks: Ranks, dtype: torch.dtype):
        self._folder, self._config, self._ranks, self._dtype = folder, config, ranks, dtype

    @torch.no_grad()
    def encode(
        self, request: VideoRequest, vae: AutoencoderKLWan | None, noise_BCFHW: torch.Tensor
    ) -> ImageCondition:
        """What the request's image says about its first window, on every rank.

        Args:
            vae: on the first rank, where it works.
            noise_BCFHW: the window's.
        """
        tokens: list[torch.Tensor] = []
        latents: list[torch.Tensor] = []
        if self._ranks.leads:
            assert vae is not None
            pipeline = self._pipeline(vae)
            tokens, latents = self._run(pipeline, self._config.windowed(request), noise_BCFHW)
        (tokens_BIE,) = self._ranks.hand_out(tokens, self._dtype)
        (latents_BCFHW,) = self._ranks.hand_out(latents, torch.float32)
        return ImageCondition(tokens_BIE, latents_BCFHW)

    def _run(
        self, pipeline: WanImageToVideoPipeline, window: VideoRequest, noise_BCFHW: torch.Tensor
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        device, batch = self._ranks.device, window.videos
        assert window.image is not None
        with Image.open(window.image) as file:
            image = file.convert("RGB")
        pixels = pipeline.video_processor.preprocess(image, height=window.height, width=window.width)
        tokens_BIE = pipeline.encode_image(image, device).repeat(batch, 1, 1)
        _, latents_BCFHW = pipeline.prepare_latents(
            pixels.to(device, torch.float32),
            batch,
            noise_BCFHW.shape[1],
            window.height,
            window.width,
            window.frames,
            torch.float32,
            device,
            latents=noise_BCFHW,
        )
        return [tokens_BIE.to(self._dtype).contiguous()], [latents_BCFHW.contiguous()]

    def _pipeline(self, vae: AutoencoderKLWan) -> WanImageToVideoPipeline:
        """diffusers' pipeline with nothing in it but what encodes images. Who needs none imports none."""
        from diffusers import WanImageToVideoPipeline
        from transformers import CLIPImageProcessor, CLIPVisionModel

        encoder = CLIPVisionModel.from_pretrained(
            self._folder.path / "image_encoder", dtype=self._config.dtype.of("image_encoder")
        )
        return WanImageToVideoPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=vae,
            scheduler=None,
            image_processor=CLIPImageProcessor.from_pretrained(self._folder.path / "image_processor"),
            image_encoder=encoder.to(self._ranks.device),
        )
