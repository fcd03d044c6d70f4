"""Weights arrive whole and once on every rank, replicated or sharded, and the video is the same."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor

from runtime.engine import Engine
from runtime.errors import BadRequestError
from runtime.media.mp4 import FrameBuffer, Frames
from runtime.models import reading
from runtime.models.folder import find_model
from runtime.models.layouts.stored import TensorReader
from runtime.models.layouts.weights import Weight
from runtime.models.wan.adapter import Transformer
from runtime.models.wan.loading import load_transformer
from runtime.models.weight_files import DIFFUSERS_STEM, WeightFiles
from runtime.parallel.ranks import Ranks
from runtime.parallel.sharding import ShardedWeights
from runtime.parallel.topology import Degrees
from runtime.request.config import EMBEDDED_MODELS, Config, Tiles, load_config
from runtime.request.memory import Memory
from tests.newer import DEFAULT_BACKEND
from tests.ranks import WarmRanks, run_ranks

LAYERS = 8
PROMPT = "a red circle moving left on a black background"
SMALL = {"width": 64, "height": 48, "frames": 5, "steps": 6, "max_sequence_length": 32, "spectrum": "paper"}


def with_memory(**memory: Any) -> Config:
    return load_config("wan-tiny").model_copy(update={"memory": Memory(**memory)})


def sharing(config: Config) -> Config:
    return config.model_copy(update={"memory": Memory(transformer="shard")})


def offloading(config: Config) -> Config:
    return config.model_copy(update={"memory": Memory(transformer="offload")})


def in_bfloat16() -> Config:
    config = load_config("wan-tiny")
    return config.model_copy(update={"dtype": config.dtype.model_copy(update={"transformer": "bfloat16"})})


def loaded(ranks: Ranks, config: Config) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """The transformer's tensors, and the bytes of each weight that this rank has read."""
    read: dict[str, int] = {}
    make = Weight.make

    def counting(weight: Weight, reader: TensorReader) -> torch.Tensor:
        tensor = make(weight, reader)
        assert weight.stored.key not in read
        read[weight.stored.key] = tensor.nbytes
        return tensor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Weight, "make", counting)
        model = load_transformer(find_model(config), config, ranks).model
    tensors = dict(model.state_dict()) | dict(model.named_buffers())
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()}, read


@pytest.mark.parametrize("config", [load_config("wan-tiny"), in_bfloat16(), with_memory(transformer="shard")])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_each_weight_is_read_once_and_all_ranks_have_the_same(
    config: Config, world: int, warm: WarmRanks
) -> None:
    path = EMBEDDED_MODELS / "wan-tiny" / "transformer"
    reference = WanTransformer3DModel.from_pretrained(path, dtype=config.dtype.of("transformer"))
    expected = dict(reference.state_dict()) | dict(reference.named_buffers())
    found = warm.run(world, loaded, config)
    for tensors, _ in found:
        assert tensors.keys() == expected.keys()
        for name, tensor in tensors.items():
            assert tensor.dtype == expected[name].dtype, name
            assert torch.equal(tensor, expected[name]), name
    shares = [read for _, read in found]
    assert sorted(name for read in shares for name in read) == sorted(reference.state_dict())
    most, least = max(sum(read.values()) for read in shares), min(sum(read.values()) for read in shares)
    assert most <= 1.1 * least


def refused(ranks: Ranks, config: Config, damaged: int, error: Exception) -> str:
    """What each rank is told if one of them cannot read its weights of a block."""
    make = Weight.make

    def broken(weight: Weight, reader: TensorReader) -> torch.Tensor:
        if ranks.node.rank == damaged and weight.stored.key.startswith("blocks.5."):
            raise error
        return make(weight, reader)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Weight, "make", broken)
        with pytest.raises(BadRequestError) as caught:
            load_transformer(find_model(config), config, ranks)
    return str(caught.value)


@pytest.mark.parametrize(
    ("world", "damaged", "error", "said"),
    [
        (1, 0, OSError(5, "Input/output error", "a.safetensors"), "'a.safetensors': Input/output error"),
        (2, 1, ValueError("a.safetensors changed"), "a.safetensors changed"),
        (3, 0, ValueError("a.safetensors changed"), "a.safetensors changed"),
        (3, 2, OSError(5, "Input/output error", "a.safetensors"), "'a.safetensors': Input/output error"),
    ],
)
def test_every_rank_tells_what_one_of_them_cannot_read(
    warm: WarmRanks, world: int, damaged: int, error: Exception, said: str
) -> None:
    told = warm.run(world, refused, load_config("wan-tiny"), damaged, error)
    assert told == [f"model: the transformer of 'wan-tiny' cannot be used: {said}"] * world


def test_no_more_is_read_ahead_than_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_AHEAD", 1000)
    weights = WeightFiles(EMBEDDED_MODELS / "wan-tiny" / "transformer", DIFFUSERS_STEM).weights()
    made, make = list[str](), Weight.make

    def counting(weight: Weight, reader: TensorReader) -> torch.Tensor:
        made.append(weight.stored.key)
        return make(weight, reader)

    monkeypatch.setattr(Weight, "make", counting)
    wanted = {name: (weight, torch.float32) for name, weight in weights.items()}
    with reading.ReadAhead(wanted) as ahead:
        for taken, (name, (weight, _)) in enumerate(wanted.items(), 1):
            assert ahead.take(name).shape == weight.shape
            left = [reading.weight_bytes(weights[one].shape, torch.float32) for one in made[taken:]]
            assert sum(left[:-1]) < 1000
    assert sorted(made) == sorted(weights)


def share_held(transformer: Transformer) -> float:
    """The part of a transformer's parameters that this rank holds."""
    whole = sum(parameter.numel() for parameter in transformer.parameters())
    held = (p.to_local() if isinstance(p, DTensor) else p for p in transformer.parameters())
    return sum(parameter.numel() for parameter in held) / whole


def bytes_of_blocks(config: Config) -> tuple[int, float]:
    """What all blocks' weights take, and which part of all parameters they are."""
    path = EMBEDDED_MODELS / "wan-tiny" / "transformer"
    model = WanTransformer3DModel.from_pretrained(path, dtype=config.dtype.of("transformer"))
    blocks = sum(parameter.numel() for parameter in model.blocks.parameters())
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.blocks.parameters())
    return size, blocks / sum(parameter.numel() for parameter in model.parameters())


@dataclass(frozen=True)
class Made:
    """A video as one rank has seen it; `held` are `share_held` before and after."""

    frames: Frames | None
    sha256: list[str]
    sent: list[int]
    held: tuple[float, float]
    has_encoder: bool
    has_vae: bool


def video(ranks: Ranks, config: Config) -> Made:
    engine = Engine(config, ranks, Degrees(cfg=1))
    sink, before = FrameBuffer(), share_held(engine.loaded.experts[0].module)
    result = engine.generate(engine.config.request(PROMPT, **SMALL), [sink] if ranks.is_leader else [])
    return Made(
        sink.frames if ranks.is_leader else None,
        result.frames_sha256,
        result.sent,
        (before, share_held(engine.loaded.experts[0].module)),
        engine.loaded.text._encoder is not None,  # type: ignore[attr-defined]
        engine.loaded.decoder.vae is not None,  # type: ignore[attr-defined]
    )


@pytest.fixture(scope="module")
def alone() -> Frames:
    frames = video(Ranks.alone(torch.device("cpu")), load_config("wan-tiny")).frames
    assert frames is not None
    return frames


@pytest.mark.parametrize("base", [load_config("wan-tiny"), in_bfloat16()], ids=["float32", "bfloat16"])
def test_sharded_weights_make_the_same_video_and_stay_sharded(base: Config) -> None:
    """Both branches are on every rank here: each block's weights are collected once for both, at every
    computed step alike, and are shares again afterwards. What is in no block stays whole: a quarter of this
    tiny model, 2 % of Wan2.1 14B."""
    whole = run_ranks(2, video, base)
    sharded = run_ranks(2, video, sharing(base))
    assert sharded[0].sha256 == whole[0].sha256
    weights, blocks = bytes_of_blocks(base)
    extra = [s - w for s, w in zip(sharded[0].sent, whole[0].sent, strict=True)]
    computed, forecast = extra[:5], extra[5]
    assert computed == [computed[0]] * 5
    assert computed[0] == pytest.approx(weights, rel=0.01)
    assert forecast == 0
    for made in sharded:
        assert made.held[0] == pytest.approx(1 - blocks / 2, abs=0.01)
        assert made.held[1] == made.held[0]
    assert [made.held for made in whole] == [(1.0, 1.0)] * 2


def test_replicas_make_the_video_of_one_rank(alone: Frames) -> None:
    made = run_ranks(2, video, load_config("wan-tiny"))[0]
    assert np.abs(made.frames.astype(int) - alone).max() <= 1


def visit(ranks: Ranks, config: Config) -> list[bool]:
    """The second rank gives its share of the third block when the first one tells that it runs the second."""
    transformer, weights, _ = load_transformer(find_model(config), config, ranks)
    assert isinstance(weights, ShardedWeights)
    blocks = list(transformer.blocks)[:3]
    if ranks.is_leader:
        whole = []
        for number, block in enumerate(weights.visit(blocks)):
            if number == 1:
                ranks.control.all_gather_object("running the second")
            whole.append(all(not isinstance(parameter, DTensor) for parameter in block.parameters()))
    else:
        first, second, third = (weights._shares[block] for block in blocks)
        for share in (first, second):
            share.unshard()
        ranks.control.all_gather_object("")
        third.unshard()
        whole = [True] * 3
        for share in (first, second, third):
            share.reshard()
    return [*whole, *(isinstance(next(block.parameters()), DTensor) for block in blocks)]


def test_the_next_block_is_collected_while_a_block_runs() -> None:
    """Were the next block waited for before a block runs, the first rank would never tell."""
    assert run_ranks(2, visit, with_memory(transformer="shard")) == [[True] * 6] * 2


def compiled(
    ranks: Ranks, config: Config, backend: str | None, widths: list[int]
) -> tuple[list[list[str]], list[int]]:
    """Digests of frames of several generations, and the graphs that were compiled until the end of each."""
    torch.compiler.set_default_backend(backend)
    engine, digests, graphs = Engine(config, ranks, Degrees(cfg=1)), [], []
    for width in widths:
        sink = FrameBuffer()
        request = engine.config.request(PROMPT, **SMALL | {"width": width, "steps": 1})
        digests.append(engine.generate(request, [sink] if ranks.is_leader else []).frames_sha256)
        graphs.append(counters["stats"]["unique_graphs"])
    return digests, graphs


@DEFAULT_BACKEND
@pytest.mark.timeout(300)
@pytest.mark.parametrize("backend", ["eager", pytest.param(None, marks=pytest.mark.slow)])
def test_compiled_blocks_may_be_sharded_or_offloaded_and_are_compiled_once(backend: str | None) -> None:
    """Once for all blocks and generations, and once more, for any size, when the second size comes."""
    if backend is None and shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("compiling for the CPU needs a C++ compiler")
    base = load_config("wan-tiny").model_copy(update={"compile": True})
    replicas = run_ranks(2, compiled, base, backend, [64, 64])
    shards = run_ranks(2, compiled, sharing(base), backend, [64, 80, 64])
    offloaded = run_ranks(2, compiled, offloading(base), backend, [64, 64])
    assert replicas[0][0] == [shards[0][0][0]] * 2 == offloaded[0][0]
    for _, graphs in (*replicas, *offloaded):
        assert 0 < graphs[0] == graphs[1] < LAYERS
    for _, graphs in shards:
        first, other, back = graphs
        assert first < other <= 2 * first
        assert first < LAYERS
        assert back == other


def test_only_the_first_rank_has_a_text_encoder_and_a_vae() -> None:
    first, second = run_ranks(2, video, load_config("wan-tiny"))
    assert [(made.has_encoder, made.has_vae) for made in (first, second)] == [(True, True), (False, False)]
    tiled = load_config("wan-tiny").model_copy(update={"tiles": Tiles(size=32, stride=24)})
    first, second = run_ranks(2, video, tiled)
    assert [(made.has_encoder, made.has_vae) for made in (first, second)] == [(True, True), (False, True)]


def test_the_vae_keeps_its_own_dtype() -> None:
    config = in_bfloat16()
    engine = Engine(config)
    assert isinstance(engine.loaded.decoder.vae, AutoencoderKLWan)  # type: ignore[attr-defined]
    assert (engine.loaded.decoder.vae.dtype, engine.loaded.dtype) == (torch.float32, torch.bfloat16)  # type: ignore[attr-defined]


@torch.no_grad()
def test_weights_that_are_kept_in_another_dtype_are_rounded_once() -> None:
    """Kept in bfloat16 and computed in float32, of which diffusers keeps some in float32 anyway."""
    base = load_config("wan-tiny")
    mixed = base.dtype.model_copy(update={"transformer": "bfloat16", "compute": "float32"})
    engine, rounded = Engine(base.model_copy(update={"dtype": mixed})), Engine(base)
    stored = dict(load_transformer(engine.model, engine.config, engine.ranks).model.named_parameters())
    for name, weight in rounded.loaded.experts[0].module.named_parameters():
        exempt = any(part in WanTransformer3DModel._keep_in_fp32_modules for part in name.split("."))
        weight.copy_(weight if exempt else weight.bfloat16())
        assert stored[name].dtype == (torch.bfloat16 if "blocks." in name and not exempt else torch.float32)
    request = base.request(PROMPT, **SMALL)
    frames = []
    for one in (engine, rounded):
        sink = FrameBuffer()
        one.generate(request, [sink])
        frames.append(sink.frames)
    assert engine.loaded.dtype == torch.float32
    assert np.array_equal(*frames)
