"""Wan as a model family: it makes videos from text, from an image (I2V), or from either (VACE, TI2V)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from runtime.models.base import Expert, ExpertSettings
from runtime.models.family import Family, Model, Sizes
from runtime.models.folder import ModelFolder
from runtime.models.layouts.adopted import Adopted
from runtime.models.layouts.given import Given
from runtime.models.wan.experts import expert_settings, read_transformer
from runtime.models.wan.folder import ModelKind, check_folder, knows_frames, transformer_shapes
from runtime.models.wan.layouts.recognise import recognise
from runtime.models.wan.lora import read_lora
from runtime.models.wan.sizes import LatentSizes
from runtime.models.wan.usual import usual_config
from runtime.parallel.ranks import Ranks
from runtime.request.bounds import Bounds
from runtime.request.config import Architecture, Config, Lora
from runtime.request.memory import Memory
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

    def usual_config(self, path: Path, pipeline: str) -> Config:
        return usual_config(path, ModelKind(pipeline))

    def read_lora(self, lora: Lora) -> str:
        return read_lora(lora).digest

    def fit_lora(self, lora: Lora, path: Path, pipeline: str) -> str:
        file = read_lora(lora)
        if lora.expert is not None and len(expert_settings(path)) == 1:
            raise file.refusal(f"it is for the expert for {lora.expert} noise; the model has one transformer")
        file.check(transformer_shapes(path, ModelKind(pipeline)))
        return file.digest

    def refuses(self, folder: ModelFolder, request: VideoRequest) -> str:
        kind, either = ModelKind(folder.pipeline), knows_frames(folder.path)
        if kind is ModelKind.IMAGE and not either and request.image is None:
            return f"image: missing; {folder.name} makes videos from an image"
        if kind is ModelKind.TEXT and not either and request.image is not None:
            return f"image: {request.image!r} given; {folder.name} makes videos from text alone"
        if kind is ModelKind.TEXT and not either and request.extend is not None:
            said = "makes videos from text alone, and takes no latents to begin with"
            return f"extend: {request.extend.file!r} given; {folder.name} {said}"
        if request.guidance_2 is not None and len(self.experts(folder)) == 1:
            return f"guidance_2: {request.guidance_2:g} given; {folder.name} has only one transformer"
        told_apart = kind is ModelKind.IMAGE and read_transformer(folder.path).sees_image_tokens
        if told_apart and request.max_sequence_length != _TEXT_BESIDE_IMAGE:
            return (
                f"max_sequence_length: {request.max_sequence_length} given; {folder.name} tells text from "
                f"image by the text's length, which must be {_TEXT_BESIDE_IMAGE}"
            )
        return ""

    def sizes(self, folder: ModelFolder) -> Sizes:
        return LatentSizes.of_model(folder)

    def experts(self, folder: ModelFolder) -> tuple[ExpertSettings, ...]:
        return expert_settings(folder.path)

    def timesteps(self, settings: Mapping[str, Any], steps: int, tokens: int) -> dict[str, Any]:
        return {}

    def load(self, folder: ModelFolder, config: Config, ranks: Ranks) -> Model:
        # These import diffusers and transformers, which takes seconds; settings alone do not need them.
        from runtime.models.loading import open_offload
        from runtime.models.wan.adapter import open_adapter
        from runtime.models.wan.attention import SelfAttention
        from runtime.models.wan.colours import WanColours
        from runtime.models.wan.image import open_image_encoder
        from runtime.models.wan.loading import load_transformer, load_vae
        from runtime.models.wan.lora_switch import WanLoras, loras_of, open_loras
        from runtime.models.wan.text import PromptEncoder
        from runtime.models.wan.vae import WanDecoder

        by_token = knows_frames(folder.path)
        present = [one for one in self.experts(folder) if one.present]
        experts, offload = [], open_offload(config.memory, len(present), ranks.device)
        opened, loras = open_loras(folder, ranks), WanLoras(ranks, folder)
        for settings in present:
            own = loras_of(settings.name, opened)
            transformer, weights, read = load_transformer(folder, config, ranks, settings.name, offload, own)
            loras.add(settings.name, transformer, weights, read)
            adapter = open_adapter(transformer, weights, config.dtype.computed, by_token=by_token)
            attention = SelfAttention(transformer, overlaps=config.performs.overlap_exchanges)
            experts.append(Expert(settings, adapter, attention, transformer))
        if offload is not None:
            offload.open()
            experts[0].adapter.expect()
        text = PromptEncoder(folder, config, ranks, config.dtype.computed)
        decoder = WanDecoder(load_vae(folder, config, ranks), config, ranks)
        image = open_image_encoder(folder, config, ranks, transformer, config.dtype.computed, decoder)
        folder.check_untouched()

        def rest(memory: Memory) -> None:
            text.rest(memory.text_encoder)
            decoder.rest(memory.vae)

        colours = WanColours(folder, decoder)
        return Model(tuple(experts), text, decoder, image, colours, offload, loras, rest)


WAN: Final[Family] = WanFamily()
