"""Wan as a model family: Wan2.1 makes videos from text, from an image (I2V), or from either (VACE)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from runtime.models.base import Expert
from runtime.models.family import Family, Model, Sizes
from runtime.models.folder import ModelFolder
from runtime.models.layouts.adopted import Adopted
from runtime.models.layouts.given import Given
from runtime.models.wan.folder import ModelKind, check_folder, transformer_shapes
from runtime.models.wan.layouts.recognise import recognise
from runtime.models.wan.lora import read_lora
from runtime.models.wan.sizes import LatentSizes
from runtime.parallel.ranks import Ranks
from runtime.request.bounds import Bounds
from runtime.request.config import Architecture, Config, Lora
from runtime.request.video_request import VideoRequest

_TEXT_BESIDE_IMAGE = 512  # text tokens after image tokens: `WanAttnProcessor` relies on this number


class WanFamily:
    """The Wan family; see `runtime.models.family.Family`."""

    name = "Wan"
    bounds = Bounds()

    def adopt(self, given: Given) -> Adopted | None:
        return recognise(given)

    def check(self, path: Path, pipeline: str, expected: Architecture | None) -> None:
        check_folder(path, ModelKind(pipeline), expected)

    def read_lora(self, lora: Lora) -> str:
        return read_lora(lora).digest

    def fit_lora(self, lora: Lora, path: Path, pipeline: str) -> str:
        file = read_lora(lora)
        file.check(transformer_shapes(path, ModelKind(pipeline)))
        return file.digest

    def refuses(self, folder: ModelFolder, request: VideoRequest) -> str:
        kind = ModelKind(folder.pipeline)
        if kind is ModelKind.IMAGE and request.image is None:
            return f"image: missing; {folder.name} makes videos from an image"
        if kind is ModelKind.TEXT and request.image is not None:
            return f"image: {request.image!r} given; {folder.name} makes videos from text alone"
        if kind is ModelKind.TEXT and request.extend is not None:
            said = "makes videos from text alone, and takes no latents to begin with"
            return f"extend: {request.extend.file!r} given; {folder.name} {said}"
        if kind is ModelKind.IMAGE and request.max_sequence_length != _TEXT_BESIDE_IMAGE:
            return (
                f"max_sequence_length: {request.max_sequence_length} given; {folder.name} tells text from "
                f"image by the text's length, which must be {_TEXT_BESIDE_IMAGE}"
            )
        return ""

    def sizes(self, folder: ModelFolder) -> Sizes:
        return LatentSizes.of_model(folder)

    def timesteps(self, settings: Mapping[str, Any], steps: int, tokens: int) -> dict[str, Any]:
        return {}

    def load(self, folder: ModelFolder, config: Config, ranks: Ranks) -> Model:
        # These import diffusers and transformers, which takes seconds; settings alone do not need them.
        from runtime.models.wan.adapter import open_adapter
        from runtime.models.wan.attention import SelfAttention
        from runtime.models.wan.colours import WanColours
        from runtime.models.wan.image import open_image_encoder
        from runtime.models.wan.loading import load_transformer, load_vae
        from runtime.models.wan.text import PromptEncoder
        from runtime.models.wan.vae import WanDecoder

        transformer, weights = load_transformer(folder, config, ranks)
        adapter = open_adapter(transformer, weights, config.dtype.computed)
        expert = Expert("transformer", adapter, SelfAttention(transformer), transformer)
        text = PromptEncoder(folder, config, ranks, adapter.dtype)
        decoder = WanDecoder(load_vae(folder, config, ranks), config, ranks)
        image = open_image_encoder(folder, config, ranks, transformer, adapter.dtype, decoder)
        return Model((expert,), text, decoder, image, WanColours(folder, decoder))


WAN: Final[Family] = WanFamily()
