"""Sizes of a request's latents, in latent frames and pixels and in tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from runtime.errors import BadRequestError
from runtime.models.folder import ModelFolder
from runtime.models.wan.experts import read_transformer
from runtime.models.wan.settings import VaeSettings
from runtime.request.config import Architecture, Config
from runtime.request.video_request import VideoRequest
from runtime.request.windows import Windows


@dataclass(frozen=True, slots=True)
class LatentSizes:
    """Sizes of a model's latents, as functions of a request.

    Attributes:
        model: name of the model.
        channels: channels of a latent.
        temporal, spatial: compression factors of the VAE.
        patch: latent frames, height and width of a token.
        positions: number of token positions along each axis.
        architecture: shape of the transformers.
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
        """Read a model's sizes from its settings; no weights are read."""
        transformer = read_transformer(folder.path)
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
        """Number of latent frames, and height and width of a latent."""
        return (
            (request.frames - 1) // self.temporal + 1,
            request.height // self.spatial,
            request.width // self.spatial,
        )

    def shape(self, request: VideoRequest) -> tuple[int, ...]:
        """Shape of the latents: `[B, C, F, H, W]`."""
        return (request.videos, self.channels, *self.of(request))

    def tokens(self, request: VideoRequest) -> int:
        """Number of tokens of one video.

        Raises:
            BadRequestError: the video does not fill whole tokens, or a token would have no position.
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
                    f"but this needs {size // patch}"
                )
            tokens *= size // patch
        return tokens

    def windows(self, request: VideoRequest, config: Config) -> Windows:
        """Windows of the video that the model sees one at a time.

        A video that extends another has those of its new part alone; they begin in what is there.
        """
        total, window = self.of(request)[0], config.window
        if window is None:
            return Windows(total, total, (0,))
        length, overlap = (window.frames - 1) // self.temporal + 1, window.overlap // self.temporal
        known = 0 if request.extend is None else (request.extend.frames - 1) // self.temporal + 1
        start = max(min(known - overlap, total - length), 0)
        return Windows.over(total - start, length, overlap).after(start)
