"""A second model family, as small as possible, for interfaces that Wan does not use.

A joint text-image transformer whose blocks also change the text tokens; two experts; embedded guidance; a
sampler whose shift depends on the number of tokens; videos of 2k + 1 frames whose sizes are multiples of 8.
Its weights are random. Importing this module registers it.

Tensor legend: B batch, L image tokens, R text tokens, S tokens on this rank, H heads, D channels, E channels
of the text, C latent channels, F latent frames, P values of a token's patch.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import nn

from runtime.errors import BadRequestError
from runtime.models.base import Embeddings, Expert, ExpertSettings, Geometry, Grid, Rotary, Tokens
from runtime.models.family import At, Model
from runtime.models.folder import ModelFolder
from runtime.models.layouts.adopted import Adopted
from runtime.models.layouts.given import Given
from runtime.models.loading import distribute, load_component, open_offload
from runtime.models.precision import Precision
from runtime.models.registry import register
from runtime.models.settings import ModelIndex
from runtime.parallel.attention import Attend
from runtime.parallel.offloading import Offload
from runtime.parallel.ranks import Ranks
from runtime.parallel.sharding import Weights
from runtime.request.bounds import Bounds
from runtime.request.config import Architecture, Config, Defaults, Dtypes, Lora
from runtime.request.performance import Performance
from runtime.request.video_request import VideoRequest
from runtime.request.windows import Windows

PIPELINE = "ToyPipeline"
BOUNDARY = 600.0
SHAPE = Architecture(layers=2, heads=3, head_dim=8, ffn_dim=48)
WIDTH = SHAPE.heads * SHAPE.head_dim
TEXT, TEXT_CHANNELS, CHANNELS = 7, 16, 4
TEMPORAL, SPATIAL, PATCH = 2, 4, 2
EXPERTS = ("transformer", "transformer_2")
_SHORT, _LONG = (16, 0.3), (256, 1.2)  # tokens and mu, as pipelines with dynamic shifting have them


class ToyBlock(nn.Module):
    """Block in which text and image tokens attend to each other, and which returns both."""

    def __init__(self) -> None:
        super().__init__()
        self.modulate = nn.Linear(WIDTH, 4 * WIDTH)
        self.text_qkv, self.image_qkv = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.text_out, self.image_out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.attend: Attend = _whole

    def forward(
        self, text_BRD: torch.Tensor, image_BSD: torch.Tensor, time_BD: torch.Tensor, rotary: Rotary
    ) -> tuple[torch.Tensor, torch.Tensor]:
        scales = self.modulate(time_BD).unsqueeze(1).chunk(4, dim=-1)
        text = F.layer_norm(text_BRD, (WIDTH,)) * (1 + scales[0])
        image = F.layer_norm(image_BSD, (WIDTH,)) * (1 + scales[1])
        of_text = [x.unflatten(2, (SHAPE.heads, -1)) for x in self.text_qkv(text).chunk(3, dim=-1)]
        of_image = [x.unflatten(2, (SHAPE.heads, -1)) for x in self.image_qkv(image).chunk(3, dim=-1)]
        of_image[:2] = [_rotate(x, rotary) for x in of_image[:2]]
        query, key, value = (torch.cat(both, dim=1) for both in zip(of_text, of_image, strict=True))
        replicated = text_BRD.shape[1]
        seen = self.attend(query, key, value, replicated).flatten(2)
        text_BRD = text_BRD + scales[2] * self.text_out(seen[:, :replicated])
        return text_BRD, image_BSD + scales[3] * self.image_out(seen[:, replicated:])


class ToyTransformer(ModelMixin, ConfigMixin):
    """The transformer, with its own forward, which the adapter must equal."""

    config_name = "config.json"
    _keep_in_fp32_modules: ClassVar[list[str]] = ["guidance_in"]

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, layers: int = SHAPE.layers) -> None:
        super().__init__()
        self.patch_in, self.text_in = nn.Linear(CHANNELS * PATCH**2, WIDTH), nn.Linear(TEXT_CHANNELS, WIDTH)
        self.time_in, self.guidance_in = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(ToyBlock() for _ in range(layers))
        self.head = nn.Linear(WIDTH, CHANNELS * PATCH**2)

    def forward(
        self,
        latents_BCFHW: torch.Tensor,
        timestep_B: torch.Tensor,
        guidance: float,
        text_BRE: torch.Tensor,
    ) -> torch.Tensor:
        adapter = ToyAdapter(self, None, self.head.weight.dtype)
        time = adapter.time(timestep_B, guidance)
        geometry = adapter.geometry(latents_BCFHW)
        (image,), text = adapter.embed(latents_BCFHW), adapter.text(text_BRE)
        for block in self.blocks:
            text, image = block(text, image, time, geometry.rotary)
        return adapter.unpatchify(adapter.project(image, time), geometry.grid)


class ToyAdapter:
    """See `runtime.models.base.Adapter`."""

    def __init__(self, model: ToyTransformer, weights: Weights | None, dtype: torch.dtype):
        self._model, self._weights, self.dtype = model, weights, dtype

    def geometry(self, latents_BCFHW: torch.Tensor) -> Geometry:
        frames, height, width = latents_BCFHW.shape[2:]
        grid = Grid(frames, height // PATCH, width // PATCH)
        angles = torch.arange(grid.tokens)[:, None] * 0.5 ** torch.arange(SHAPE.head_dim // 2)
        angles_1L1D = angles.repeat(1, 2)[None, :, None].to(latents_BCFHW.device)
        return Geometry(grid, (angles_1L1D.cos(), angles_1L1D.sin()))

    def text(self, embeddings_BTE: torch.Tensor, image_BIE: torch.Tensor | None = None) -> torch.Tensor:
        text_BRD: torch.Tensor = self._model.text_in(embeddings_BTE)
        return text_BRD

    def time(self, timestep_B: torch.Tensor, guidance: float | None = None) -> torch.Tensor:
        assert guidance is not None, "this family has guidance embedded"
        model = self._model
        scale_B = torch.full_like(timestep_B, guidance, dtype=torch.float32)
        of_guidance = model.guidance_in(_sinusoids(scale_B * 100)).to(self.dtype)
        time_BD: torch.Tensor = F.silu(model.time_in(_sinusoids(timestep_B).to(self.dtype)) + of_guidance)
        return time_BD

    def embed(self, latents_BCFHW: torch.Tensor, condition_BCFHW: torch.Tensor | None = None) -> Tokens:
        batch, channels, frames, height, width = latents_BCFHW.shape
        patches = latents_BCFHW.reshape(
            batch, channels, frames, height // PATCH, PATCH, width // PATCH, PATCH
        ).permute(0, 2, 3, 5, 1, 4, 6)
        return (self._model.patch_in(patches.flatten(1, 3).flatten(2)),)

    def expect(self) -> None:
        assert self._weights is not None
        self._weights.expect(list(self._model.blocks))

    def branches(
        self, tokens: Tokens, texts_BTD: Sequence[torch.Tensor], time: torch.Tensor, rotary: Rotary
    ) -> list[torch.Tensor]:
        texts, images = list(texts_BTD), [tokens[0]] * len(texts_BTD)
        assert self._weights is not None
        for block in self._weights.visit(list(self._model.blocks)):
            for branch in range(len(texts)):
                texts[branch], images[branch] = block(texts[branch], images[branch], time, rotary)
        return images

    def project(self, feature_BLD: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        patches_BLP: torch.Tensor = self._model.head(F.layer_norm(feature_BLD, (WIDTH,)) + time.unsqueeze(1))
        return patches_BLP

    def unpatchify(self, patches_BLP: torch.Tensor, grid: Grid) -> torch.Tensor:
        blocks = patches_BLP.unflatten(1, (grid.frames, grid.height, grid.width))
        blocks = blocks.unflatten(4, (CHANNELS, PATCH, PATCH)).permute(0, 4, 1, 2, 5, 3, 6)
        return blocks.flatten(5, 6).flatten(3, 4)


class ToyAttention:
    """See `runtime.models.base.AttentionSwitch`."""

    joint = True

    def __init__(self, model: ToyTransformer):
        self._blocks = list(model.blocks)

    def split(self, attend: Attend) -> None:
        for block in self._blocks:
            block.attend = attend

    def restore(self) -> None:
        self.split(_whole)


class ToyTextEncoder:
    """Text encoder whose embeddings are noise, seeded by the words of the prompt."""

    def __init__(self, ranks: Ranks, dtype: torch.dtype):
        self._ranks, self._dtype = ranks, dtype
        self.warnings: list[str] = []

    def encode(self, request: VideoRequest) -> Embeddings:
        texts = [request.prompt, *(point.prompt for point in request.travel)] if self._ranks.is_leader else []
        own = [_embedding(text).repeat(request.videos, 1, 1) for text in texts]
        own = [one.to(self._ranks.device, self._dtype) for one in own]
        return Embeddings(self._ranks.broadcast_tensors(own, self._dtype))


class ToyDecoder:
    """Decoder whose pixels are the first three channels of the latents."""

    def __init__(self, ranks: Ranks):
        self._ranks = ranks

    def frames(self, latents_BCFHW: torch.Tensor, at: At) -> Generator[torch.Tensor]:
        if not self._ranks.is_leader:
            return
        for number, latent in enumerate(latents_BCFHW.unbind(2)):
            pixels = F.interpolate(latent[:, :3], scale_factor=SPATIAL).sigmoid().permute(0, 2, 3, 1)
            yield pixels[:, None].repeat(1, TEMPORAL if number else 1, 1, 1, 1)


@dataclass(frozen=True, slots=True)
class ToySizes:
    """See `runtime.models.family.Sizes`."""

    architecture: Architecture = SHAPE

    def shape(self, request: VideoRequest) -> tuple[int, ...]:
        frames = (request.frames - 1) // TEMPORAL + 1
        return request.videos, CHANNELS, frames, request.height // SPATIAL, request.width // SPATIAL

    def tokens(self, request: VideoRequest) -> int:
        if request.width % (SPATIAL * PATCH) or request.height % (SPATIAL * PATCH):
            raise BadRequestError(f"size: needs multiples of {SPATIAL * PATCH}")
        return math.prod(self.shape(request)[2:]) // PATCH**2

    def windows(self, request: VideoRequest, config: Config) -> Windows:
        total, window = self.shape(request)[2], config.window
        if window is None:
            return Windows(total, total, (0,))
        return Windows.over(total, (window.frames - 1) // TEMPORAL + 1, window.overlap // TEMPORAL)


class ToyIndex(ModelIndex):
    """Contents of `model_index.json`: where the second expert begins, and its kind of history."""

    boundary: float
    history: Literal["fresh", "carried"]


class ToyFamily:
    """See `runtime.models.family.Family`."""

    name = "Toy"
    bounds = Bounds(pixels=8, frames=2, most_frames=101, guidance="embedded")

    def adopt(self, given: Given) -> Adopted | None:
        if any("toy" in one.tensors for one in given.readable()):
            raise ValueError("it is a toy in a box")
        return None

    def check(self, path: Path, pipeline: str, expected: Architecture | None) -> None:
        ToyIndex.read(path / "model_index.json")
        if expected not in (None, SHAPE):
            raise ValueError(f"its transformer has {SHAPE}, but the config expects {expected}")

    def usual_config(self, path: Path, pipeline: str) -> Config:
        size = Defaults(width=16, height=16, frames=5)
        return Config(model="toy", architecture=SHAPE, bounds=self.bounds, defaults=size)

    def read_lora(self, lora: Lora) -> str:
        raise BadRequestError(f"lora: {lora.file!r} given; Toy takes none")

    def fit_lora(self, lora: Lora, path: Path, pipeline: str) -> str:
        raise BadRequestError(f"lora: {lora.file!r} given; Toy takes none")

    def refuses(self, folder: ModelFolder, request: VideoRequest) -> str:
        return "" if request.image is None else f"image: {request.image!r} given; Toy takes none"

    def sizes(self, folder: ModelFolder) -> ToySizes:
        return ToySizes()

    def experts(self, folder: ModelFolder) -> tuple[ExpertSettings, ...]:
        index = ToyIndex.read(folder.path / "model_index.json")
        first, second = EXPERTS
        return (
            ExpertSettings(first, boundary=index.boundary, history=index.history),
            ExpertSettings(second, guidance=lambda one: one.guidance / 2, history=index.history, warmup=2),
        )

    def timesteps(self, settings: Mapping[str, Any], steps: int, tokens: int) -> dict[str, Any]:
        return {"mu": shift_of(tokens)} if settings.get("use_dynamic_shifting") else {}

    def load(self, folder: ModelFolder, config: Config, ranks: Ranks) -> Model:
        if config.performs != Performance():
            raise BadRequestError(f"performance: {config.performs.text} asked for; Toy is only exact")
        settings = self.experts(folder)
        offload = open_offload(config.memory, len(settings), ranks.device)
        experts = tuple(self._expert(one, folder, config, ranks, offload) for one in settings)
        text, decoder = ToyTextEncoder(ranks, config.dtype.computed), ToyDecoder(ranks)
        return Model(experts, text, decoder, offload=offload)

    def _expert(
        self,
        settings: ExpertSettings,
        folder: ModelFolder,
        config: Config,
        ranks: Ranks,
        offload: Offload | None,
    ) -> Expert:
        name = settings.name
        kept, computed = config.dtype.of("transformer"), config.dtype.computed
        arriving = load_component(ToyTransformer, folder, name, kept, ranks.node)
        model, shard = arriving.model, config.memory.transformer == "shard"
        blocks = list(model.blocks)
        weights = distribute(arriving, ranks, name, blocks, shard=shard, offload=offload)
        precision = Precision(kept, computed, model._keep_in_fp32_modules)
        precision.convert(model, blocks)
        adapter = ToyAdapter(model, precision.visiting(weights), computed)
        return Expert(settings, adapter, ToyAttention(model), model)


TOY = ToyFamily()
register(PIPELINE, "tests.family:TOY")


def shift_of(tokens: int) -> float:
    """Shift of the sampler for a number of tokens: a straight line."""
    slope = (_LONG[1] - _SHORT[1]) / (_LONG[0] - _SHORT[0])
    return _SHORT[1] + slope * (tokens - _SHORT[0])


def write_toy(folder: Path, history: str = "fresh") -> Path:
    """Write a model of the family, in diffusers layout."""
    for number, name in enumerate(EXPERTS):
        torch.manual_seed(number)
        ToyTransformer().save_pretrained(folder / name)
    FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).save_pretrained(folder / "scheduler")
    index = {"_class_name": PIPELINE, "boundary": BOUNDARY, "history": history}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def toy_config(folder: Path, **changes: Any) -> Config:
    """Make the config of the model in `folder`."""
    defaults = Defaults(width=40, height=24, frames=5, steps=12, guidance=3.5, spectrum="paper")
    given = {"model": str(folder), "bounds": TOY.bounds, "dtype": Dtypes(transformer="float32"), "fps": 8}
    return Config(**{**given, "defaults": defaults, **changes})


def _whole(
    query_BSHD: torch.Tensor, key_BSHD: torch.Tensor, value_BSHD: torch.Tensor, replicated: int = 0, /
) -> torch.Tensor:
    heads_first = [x.transpose(1, 2) for x in (query_BSHD, key_BSHD, value_BSHD)]
    return F.scaled_dot_product_attention(*heads_first).transpose(1, 2)


def _rotate(x_BSHD: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    cosines, sines = (table.to(x_BSHD.dtype) for table in rotary)
    low, high = x_BSHD.chunk(2, dim=-1)
    return x_BSHD * cosines + torch.cat((-high, low), dim=-1) * sines


def _sinusoids(value_B: torch.Tensor) -> torch.Tensor:
    frequencies = torch.exp(-torch.arange(WIDTH // 2, device=value_B.device) * (math.log(1000) / WIDTH * 2))
    angles = value_B.float()[:, None] * frequencies / 100
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def _embedding(text: str) -> torch.Tensor:
    seed = int(hashlib.sha256(text.encode()).hexdigest()[:8], 16)
    return torch.randn(1, TEXT, TEXT_CHANNELS, generator=torch.Generator().manual_seed(seed))
