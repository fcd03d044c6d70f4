"""Image conditioning, encoded on the first rank only and broadcast to the others.

Image to video (I2V) is conditioned on latents of the known frames, and in Wan2.1 on image tokens, too; VACE
on latents of the known and of the editable regions and on a mask, where here either an image is known or
nothing.

Tensor legend: B batch, I image tokens, E image encoder channels, C latent channels with those of a mask, F
latent frames, H, W latent height and width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKLWan
from PIL import Image

from runtime.models.base import ImageCondition, Layout
from runtime.models.folder import ModelFolder
from runtime.models.loading import read_component
from runtime.models.wan.adapter import Transformer
from runtime.models.wan.folder import ModelKind
from runtime.models.wan.vae import WanDecoder
from runtime.parallel.ranks import Ranks
from runtime.request.config import Config
from runtime.request.video_request import VideoRequest

if TYPE_CHECKING:
    from diffusers import WanImageToVideoPipeline


class WanImageEncoder(ABC):
    """Encoder of image conditioning for one rank group; subclasses encode for one kind of model.

    Args:
        folder, config, ranks: the model, its config, and the ranks.
        transformer: transformer that is conditioned.
        dtype: its compute dtype.
        decoder: decoder whose VAE also encodes.
    """

    def __init__(
        self,
        folder: ModelFolder,
        config: Config,
        ranks: Ranks,
        transformer: Transformer,
        dtype: torch.dtype,
        decoder: WanDecoder,
    ):
        self._folder, self._config, self._ranks = folder, config, ranks
        self._transformer, self._dtype, self._decoder = transformer, dtype, decoder

    @torch.no_grad()
    def encode(
        self, request: VideoRequest, image: Image.Image | None, noise_BCFHW: torch.Tensor
    ) -> ImageCondition:
        """Encode the conditioning of the request's first window; every rank gets it.

        Args:
            request: the request.
            image: its image, on the first rank; None if it has none.
            noise_BCFHW: initial noise of the window.
        """
        encoded: list[torch.Tensor] = []
        with self._decoder.at_work() as vae:
            if self._ranks.is_leader:
                assert vae is not None
                own = self._encode(self._config.windowed(request), image, vae, noise_BCFHW)
                encoded = [tensor.to(self._dtype).contiguous() for tensor in own]
        latents_BCFHW, *tokens = self._ranks.broadcast_tensors(encoded, self._dtype)
        layout = self._layout(noise_BCFHW.shape[1], latents_BCFHW.shape[1])
        return ImageCondition(latents_BCFHW, layout, *tokens)

    @abstractmethod
    def _encode(
        self,
        window: VideoRequest,
        image: Image.Image | None,
        vae: AutoencoderKLWan,
        noise_BCFHW: torch.Tensor,
    ) -> list[torch.Tensor]:
        """Encode latents, and image tokens if the model has them; in any dtype."""

    @abstractmethod
    def _layout(self, channels: int, total: int) -> Layout:
        """Channel layout of the conditioning.

        Args:
            channels: channels of a latent.
            total: channels of the conditioning.
        """


class I2VEncoder(WanImageEncoder):
    """Encoder for I2V. The image encoder, which Wan2.2 does not have, is loaded for each image, and freed.

    Source: `diffusers.WanImageToVideoPipeline`, which does the encoding.
    """

    def _encode(
        self,
        window: VideoRequest,
        image: Image.Image | None,
        vae: AutoencoderKLWan,
        noise_BCFHW: torch.Tensor,
    ) -> list[torch.Tensor]:
        pipeline, device, batch = self._pipeline(vae), self._ranks.device, window.videos
        assert image is not None
        pixels = pipeline.video_processor.preprocess(image, height=window.height, width=window.width)
        tokens = [pipeline.encode_image(image, device).repeat(batch, 1, 1)] if self._sees_tokens else []
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
        return [latents_BCFHW, *tokens]

    def _layout(self, channels: int, total: int) -> Layout:
        return Layout(known=slice(total - channels, total), mask=slice(total - channels), mark=1.0)

    @property
    def _sees_tokens(self) -> bool:
        return self._transformer.config.image_dim is not None

    def _pipeline(self, vae: AutoencoderKLWan) -> WanImageToVideoPipeline:
        """Make diffusers' pipeline with only the parts that encode images."""
        from diffusers import WanImageToVideoPipeline

        own = self._image_encoder() if self._sees_tokens else {}
        return WanImageToVideoPipeline(tokenizer=None, text_encoder=None, vae=vae, scheduler=None, **own)

    def _image_encoder(self) -> dict[str, Any]:
        """Load the image encoder, and what prepares images for it."""
        from transformers import CLIPImageProcessor, CLIPVisionModel

        dtype = self._config.dtype.of("image_encoder")
        encoder = read_component(CLIPVisionModel, self._folder, "image_encoder", dtype)
        processor = CLIPImageProcessor.from_pretrained(self._folder.path / "image_processor")
        return {"image_processor": processor, "image_encoder": encoder.to(self._ranks.device)}


class VaceEncoder(WanImageEncoder):
    """Encoder for Wan2.1's VACE: with an image the first frame is known, without one nothing is.

    Source: `diffusers.WanVACEPipeline`, which does the encoding.
    """

    def _encode(
        self,
        window: VideoRequest,
        image: Image.Image | None,
        vae: AutoencoderKLWan,
        noise_BCFHW: torch.Tensor,
    ) -> list[torch.Tensor]:
        from diffusers import WanVACEPipeline

        pipeline: Any = WanVACEPipeline(
            tokenizer=None, text_encoder=None, vae=vae, scheduler=None, transformer=self._transformer
        )
        device = self._ranks.device
        video, mask = None, None  # nothing is known
        if image is not None:
            size = window.width, window.height
            gray, unknown = Image.new("RGB", size, (128, 128, 128)), Image.new("L", size, 255)
            video = [image.resize(size, Image.Resampling.LANCZOS), *[gray] * (window.frames - 1)]
            mask = [Image.new("L", size, 0), *[unknown] * (window.frames - 1)]
        pixels, masks, references = pipeline.preprocess_conditions(
            video, mask, None, 1, window.height, window.width, window.frames, torch.float32, device
        )
        latents_BCFHW = torch.cat(
            [
                pipeline.prepare_video_latents(pixels, masks, references, None, device).float(),
                pipeline.prepare_masks(masks, references).float(),
            ],
            dim=1,
        )
        return [latents_BCFHW.repeat(window.videos, 1, 1, 1, 1)]

    def _layout(self, channels: int, total: int) -> Layout:
        return Layout(known=slice(channels), mask=slice(2 * channels, total), mark=0.0)


_ENCODERS: dict[ModelKind, type[WanImageEncoder]] = {ModelKind.IMAGE: I2VEncoder, ModelKind.VACE: VaceEncoder}


def open_image_encoder(
    folder: ModelFolder,
    config: Config,
    ranks: Ranks,
    transformer: Transformer,
    dtype: torch.dtype,
    decoder: WanDecoder,
) -> WanImageEncoder | None:
    """Make the encoder for a model's kind; None for a model that is conditioned on text alone."""
    kind = _ENCODERS.get(ModelKind(folder.pipeline))
    return None if kind is None else kind(folder, config, ranks, transformer, dtype, decoder)
