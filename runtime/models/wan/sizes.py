"""Sizes of a request's latents, in latent frames and pixels and in tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from runtime.errors import BadRequestError
from runtime.models.folder import ModelFolder
from runtime.models.wan.settings import TransformerSettings, VaeSettings
from runtime.request.config import Architecture, Config
from runtime.request.video_request import VideoRequest
from runtime.request.windows import Windows


@dataclass(frozen=True, slots=True)
class LatentSizes:
    """What a model makes of pixels.

    Attributes:
        model: its name.
        channels: of a latent.
        temporal, spatial: how much smaller latents are than the video.
        patch: latent frames, height and width of a token.
        positions: for tokens, along each axis.
        architecture: of the transformer.
    """

    model: str
    channels: int
    temporal: int
    spatial: int
    patch: tuple[int, int, int]
    positions: int
    architecture: Architecture

    @classmethod
    def of_model(cls, folder: ModelFolder) -> Self:
        """By its settings; no weights are read."""
        transformer = TransformerSettings.read(folder.path / "transformer" / "config.json")
        vae = VaeSettings.read(folder.path / "vae" / "config.json")
        frames, height, width = transformer.patch_size
        return cls(
            model=folder.name,
            channels=transformer.channels,
            temporal=vae.scale_factor_temporal,
            spatial=vae.scale_factor_spatial,
            patch=(frames, height, width),
            positions=transformer.rope_max_seq_len,
            architecture=transformer.architecture,
        )

    def of(self, request: VideoRequest) -> tuple[int, int, int]:
        """Latent frames, height and width."""
        return (
            (request.frames - 1) // self.temporal + 1,
            request.height // self.spatial,
            request.width // self.spatial,
        )

    def shape(self, request: VideoRequest) -> tuple[int, ...]:
        """Shape of the latents: `[B, C, F, H, W]`."""
        return (request.videos, self.channels, *self.of(request))

    def tokens(self, request: VideoRequest) -> int:
        """Tokens of one video; it must fill whole ones, and there must be a position for each.

        Raises:
            BadRequestError: it does not, or there is none.
        """
        tokens = 1
        for name, size, patch in zip(
            ("frames", "height", "width"), self.of(request), self.patch, strict=True
        ):
            given = f"{name}: {getattr(request, name)} given; {self.model}"
            if size % patch:
                raise BadRequestError(f"{given} needs a multiple of {self.spatial * patch}")
            if size // patch > self.positions:
                raise BadRequestError(
                    f"{given} has positions for {self.positions} tokens along each axis, "
                    f"and this would be {size // patch}"
                )
            tokens *= size // patch
        return tokens

    def windows(self, request: VideoRequest, config: Config) -> Windows:
        """What of it the model sees at a time."""
        total, window = self.of(request)[0], config.window
        if window is None:
            return Windows(total, total, (0,))
        return Windows.over(total, (window.frames - 1) // self.temporal + 1, window.overlap // self.temporal)
