"""Image conditioning, encoded on the first rank only and broadcast to the others.

Image to video (I2V) is conditioned on latents of the known frames, and in Wan2.1 on image tokens, too; VACE
on latents of the known and of the editable regions and on a mask, where here either an image is known or
nothing. In TI2V the latents of an image take the place of noisy ones.

Tensor legend: B batch, I image tokens, E image encoder channels, C latent channels with those of a mask, F
latent frames, H, W latent height and width, 3 colours.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from diffusers import AutoencoderKLWan
from PIL import Image

from runtime.models.base import Condition, ImageCondition, KnownFrames, Layout
from runtime.models.folder import ModelFolder
from runtime.models.loading import read_component
from runtime.models.wan.adapter import Transformer
from runtime.models.wan.folder import ModelKind, knows_frames
from runtime.models.wan.parts import on_every_rank
from runtime.models.wan.shared_encoder import SharedEncoder
from runtime.models.wan.vae import WanDecoder
from runtime.parallel.ranks import Ranks
from runtime.request.config import Config
from runtime.request.video_request import VideoRequest

if TYPE_CHECKING:
    from diffusers import WanImageToVideoPipeline

Vae: TypeAlias = AutoencoderKLWan | SharedEncoder


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
    ) -> Condition:
        """Encode the conditioning of the request's first window; every rank gets it.

        Args:
            request: the request.
            image: its image, on the first rank; None if it has none.
            noise_BCFHW: initial noise of the window.
        """
        encoded: list[torch.Tensor] = []
        window = self._config.windowed(request)

        def lead(vae: Vae) -> None:
            own = self._encode(window, image, vae, noise_BCFHW)
            encoded.extend(tensor.to(self._kept_in).contiguous() for tensor in own)

        with self._decoder.at_work() as vae:
            if on_every_rank(self._config, self._ranks.size):
                assert vae is not None
                SharedEncoder(vae, self._ranks).run(lead)
            elif vae is not None and self._ranks.is_leader:
                lead(vae)
        received = self._ranks.broadcast_tensors(encoded, self._kept_in)
        return self.condition(noise_BCFHW.shape[1], *received)

    @property
    def _kept_in(self) -> torch.dtype:
        """Dtype of the conditioning."""
        return self._dtype

    @abstractmethod
    def condition(self, channels: int, latents_BCFHW: torch.Tensor, *tokens: torch.Tensor) -> Condition:
        """Make the conditioning of what was encoded.

        Args:
            channels: channels of a latent.
            latents_BCFHW: encoded latents.
            tokens: image tokens, if the model has them.
        """

    @abstractmethod
    def _encode(
        self,
        window: VideoRequest,
        image: Image.Image | None,
        vae: Vae,
        noise_BCFHW: torch.Tensor,
    ) -> list[torch.Tensor]:
        """Encode latents, and image tokens if the model has them; in any dtype."""


class FramesEncoder(WanImageEncoder):
    """Encoder for TI2V: with an image the first latent frame is known, without one nothing is.

    Source: `diffusers.WanImageToVideoPipeline` with `expand_timesteps`, which does the encoding.
    """

    def encode(
        self, request: VideoRequest, image: Image.Image | None, noise_BCFHW: torch.Tensor
    ) -> Condition:
        if request.image is None:
            return KnownFrames(noise_BCFHW[:, :, :0])
        return super().encode(request, image, noise_BCFHW)

    @property
    def _kept_in(self) -> torch.dtype:
        """Float32: known latents are also what is decoded in the end."""
        return torch.float32

    def condition(self, channels: int, latents_BCFHW: torch.Tensor, *tokens: torch.Tensor) -> Condition:
        return KnownFrames(latents_BCFHW)

    def _encode(
        self,
        window: VideoRequest,
        image: Image.Image | None,
        vae: Vae,
        noise_BCFHW: torch.Tensor,
    ) -> list[torch.Tensor]:
        from diffusers import WanImageToVideoPipeline

        assert image is not None
        pipeline = WanImageToVideoPipeline(
            tokenizer=None, text_encoder=None, vae=vae, scheduler=None, expand_timesteps=True
        )
        pixels = pipeline.video_processor.preprocess(image, height=window.height, width=window.width)
        _, latents_BCFHW, _ = _prepare_latents(pipeline, pixels, window, noise_BCFHW)
        return [latents_BCFHW]


class I2VEncoder(WanImageEncoder):
    """Encoder for I2V. The image encoder, which Wan2.2 does not have, is loaded for each image, and freed.

    Source: `diffusers.WanImageToVideoPipeline`, which does the encoding.
    """

    def _encode(
        self,
        window: VideoRequest,
        image: Image.Image | None,
        vae: Vae,
        noise_BCFHW: torch.Tensor,
    ) -> list[torch.Tensor]:
        pipeline, device, batch = self._pipeline(vae), self._ranks.device, window.videos
        assert image is not None
        pixels = pipeline.video_processor.preprocess(image, height=window.height, width=window.width)
        tokens = [pipeline.encode_image(image, device).repeat(batch, 1, 1)] if self._sees_tokens else []
        _, latents_BCFHW = _prepare_latents(pipeline, pixels, window, noise_BCFHW)
        return [latents_BCFHW, *tokens]

    def condition(self, channels: int, latents_BCFHW: torch.Tensor, *tokens: torch.Tensor) -> Condition:
        of_mask = latents_BCFHW.shape[1] - channels
        layout = Layout(known=slice(of_mask, of_mask + channels), mask=slice(of_mask), mark=1.0)
        return ImageCondition(latents_BCFHW, *tokens, layout=layout)

    @property
    def _sees_tokens(self) -> bool:
        return self._transformer.config.image_dim is not None

    def _pipeline(self, vae: Vae) -> WanImageToVideoPipeline:
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
        vae: Vae,
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

    def condition(self, channels: int, latents_BCFHW: torch.Tensor, *tokens: torch.Tensor) -> Condition:
        mask = slice(2 * channels, latents_BCFHW.shape[1])
        layout = Layout(known=slice(channels), mask=mask, mark=0.0)
        return ImageCondition(latents_BCFHW, *tokens, layout=layout)


_ENCODERS: dict[ModelKind, type[WanImageEncoder]] = {ModelKind.IMAGE: I2VEncoder, ModelKind.VACE: VaceEncoder}


def _prepare_latents(
    pipeline: WanImageToVideoPipeline,
    pixels_B3HW: torch.Tensor,
    window: VideoRequest,
    noise_BCFHW: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Encode the pixels of an image as the pipeline does, in float32; the first result is the noise."""
    device = noise_BCFHW.device
    prepared: tuple[torch.Tensor, ...] = pipeline.prepare_latents(
        pixels_B3HW.to(device, torch.float32),
        window.videos,
        noise_BCFHW.shape[1],
        window.height,
        window.width,
        window.frames,
        torch.float32,
        device,
        latents=noise_BCFHW,
    )
    return prepared


def open_image_encoder(
    folder: ModelFolder,
    config: Config,
    ranks: Ranks,
    transformer: Transformer,
    dtype: torch.dtype,
    decoder: WanDecoder,
) -> WanImageEncoder | None:
    """Make the encoder for a model's kind; None for a model that is conditioned on text alone."""
    by_frames = knows_frames(folder.path)
    kind = FramesEncoder if by_frames else _ENCODERS.get(ModelKind(folder.pipeline))
    return None if kind is None else kind(folder, config, ranks, transformer, dtype, decoder)
