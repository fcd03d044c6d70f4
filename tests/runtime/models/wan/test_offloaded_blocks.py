"""Blocks in host memory (`memory.experts: swap`, `memory.transformer: offload`) make the same bits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from runtime.engine import Engine
from runtime.media.mp4 import FrameBuffer
from runtime.models.base import Expert
from runtime.parallel.ranks import Ranks
from runtime.parallel.topology import Degrees
from runtime.reports.report import ModelPart, build_report
from runtime.request.config import Config, Dtypes, Lora, load_config
from runtime.request.memory import Memory
from runtime.request.sampler import SamplerConfig
from runtime.request.video_request import VideoRequest
from runtime.sampling.denoise import StepRecord
from tests.conditioned import config_of, denoised_on, write_two_experts
from tests.launch.commands.test_lora_option import write as write_lora
from tests.ranks import run_ranks
from tests.stopping import stop_and_resume

SWAP, OFFLOAD = Memory(experts="swap"), Memory(transformer="offload")
LAYERS = 4


@pytest.fixture(scope="module")
def own(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = write_two_experts("WanPipeline", tmp_path_factory.mktemp("two"), layers=LAYERS)
    return config_of(config, folder).model_copy(update={"scheduler": SamplerConfig(kind="unipc", shift=12.0)})


def ask(config: Config, **fields: object) -> VideoRequest:
    given = {
        "width": 64,
        "height": 48,
        "frames": 5,
        "steps": 8,
        "guidance": 4.0,
        "guidance_2": 2.5,
        "seed": 3,
    }
    return config.request("a red circle", **{**given, "spectrum": "paper", **fields})


def placed(config: Config, memory: Memory) -> Config:
    return config.model_copy(update={"memory": memory})


def size_of(expert: Expert, part: str = "") -> int:
    """Bytes of an expert's weights in a part."""
    module = expert.module.get_submodule(part)
    return sum(weight.numel() * weight.element_size() for weight in module.parameters())


def in_memory(expert: Expert) -> int:
    """Bytes that one of an expert's blocks takes where it is offloaded to: each weight is aligned."""
    weights = expert.module.get_submodule("blocks.0").parameters()
    return sum(-(-weight.numel() * weight.element_size() // 512) * 512 for weight in weights)


@pytest.mark.parametrize(("memory", "blocks_there"), [(SWAP, LAYERS), (OFFLOAD, 2)], ids=["swap", "offload"])
def test_frames_are_the_same_and_few_blocks_are_on_the_device(
    own: Config, memory: Memory, blocks_there: int
) -> None:
    """What is there is counted after every step, and the most of it is in the report."""
    kept, engine = Engine(own), Engine(placed(own, memory))
    offload, (high, low) = engine.loaded.offload, engine.loaded.experts
    assert offload is not None and kept.loaded.offload is None
    held: list[int] = []

    def on_step(record: StepRecord) -> None:
        held.append(offload.held)

    frames: dict[str, FrameBuffer] = {}
    for name, one in (("keep", kept), ("moved", engine), ("again", engine)):
        frames[name] = FrameBuffer()
        result = one.generate(ask(own), [frames[name]], on_step if one is engine else lambda _: None)
        told = build_report(ModelPart(name="two", revision=""), result, [], load_seconds=0, write_seconds=0)
        weights = json.loads(told.to_json())["memory"]["weights"]
        blocks = size_of(high, "blocks")
        beside = size_of(high) + size_of(low) - 2 * blocks
        assert weights == beside + (2 * blocks if one is kept else blocks_there * in_memory(high))
    assert held == [blocks_there * in_memory(high)] * 16
    assert (frames["keep"].frames == frames["moved"].frames).all()
    assert (frames["keep"].frames == frames["again"].frames).all()


def copied(ranks: Ranks, config: Config, request: VideoRequest) -> list[tuple[str, str, int]]:
    """Each step's expert and kind on a rank, and the number of blocks that were copied for it."""
    engine, found = Engine(config, ranks), []
    offload, (high, _) = engine.loaded.offload, engine.loaded.experts
    assert offload is not None
    before = [offload.moved]

    def on_step(record: StepRecord) -> None:
        found.append((record.expert, str(record.kind), (offload.moved - before[-1]) // in_memory(high)))
        before.append(offload.moved)

    engine.generate(request, [FrameBuffer()] if ranks.is_leader else [], on_step)
    return found


@pytest.mark.timeout(240)
@pytest.mark.parametrize("memory", [SWAP, OFFLOAD], ids=["swap", "offload"])
def test_blocks_come_for_computed_steps_and_the_next_expert_while_steps_are_forecast(
    own: Config, tmp_path: Path, memory: Memory
) -> None:
    path = tmp_path / "guided.yaml"
    path.write_text(
        "stream: guided\nschedule: {kind: explicit, computed: [0, 1, 2, 7]}\npredictor: {kind: linear}\n"
        "switch: {history: carried}\n"
    )
    told = run_ranks(2, copied, placed(own, memory), ask(own, spectrum=str(path)))
    assert told[0] == told[1]
    experts, kinds, blocks = zip(*told[0], strict=True)
    assert kinds == ("compute",) * 3 + ("forecast",) * 4 + ("compute",)
    assert experts[2] == "transformer" and experts[7] == "transformer_2"
    if memory is SWAP:
        assert blocks == (0, 0, LAYERS, 0, 0, 0, 0, 0)  # once no earlier step of the first will be computed
    else:
        assert blocks == (LAYERS, LAYERS, LAYERS + 2, 0, 0, 0, 0, LAYERS)


@pytest.mark.timeout(240)
def test_ranks_that_offload_make_what_ranks_that_keep_make(own: Config) -> None:
    request = ask(own)
    for degrees in (Degrees(cfg=2), Degrees(ulysses=2)):
        kept = run_ranks(2, denoised_on, own, request, degrees)
        for memory in (SWAP, OFFLOAD):
            moved = run_ranks(2, denoised_on, placed(own, memory), request, degrees)
            assert all(torch.equal(one, kept[0]) for one in (*kept, *moved))


def test_it_resumes_with_the_expert_that_is_needed(own: Config, tmp_path: Path) -> None:
    for memory in (SWAP, OFFLOAD):
        config = placed(own, memory)
        engine, request = Engine(config), ask(own)
        first = engine.plan(request).course.numbers.index(1)
        at = [first - 3, first - 1]
        found = stop_and_resume(engine.ranks, config, request, tmp_path / str(memory.transformer), at)
        assert [resumed for resumed, _, _ in found] == [step + 3 for step in at]
        assert all(frames and decisions for _, frames, decisions in found)


def test_weights_kept_in_another_dtype_are_offloaded_as_they_are_kept(own: Config) -> None:
    dtypes = Dtypes(transformer="bfloat16", compute="float32", text_encoder="float32")
    mixed = own.model_copy(update={"dtype": dtypes})
    engines = [Engine(mixed), Engine(placed(mixed, SWAP)), Engine(placed(mixed, OFFLOAD))]
    made = {tuple(engine.generate(ask(mixed), [FrameBuffer()]).frames_sha256) for engine in engines}
    assert len(made) == 1
    kept, swapped, offloaded = (engine.loaded.weight_bytes for engine in engines)
    assert offloaded < swapped < kept


def test_a_lora_is_merged_before_blocks_are_offloaded(tmp_path: Path) -> None:
    """Into wan-tiny, whose only transformer is offloaded, too."""
    write_lora(tmp_path / "one.safetensors")
    lora = Lora(file=str(tmp_path / "one.safetensors"))
    changed = load_config("wan-tiny").model_copy(update={"lora": (lora,)})
    request = changed.request("x", width=64, height=48, frames=5, steps=2, max_sequence_length=32)
    made = []
    for config in (changed, placed(changed, OFFLOAD), load_config("wan-tiny")):
        engine = Engine(config)
        made.append(engine.generate(request, [FrameBuffer()]).frames_sha256)
    assert made[0] == made[1] != made[2]


@pytest.mark.parametrize("experts", ["keep", "swap"])
def test_offloaded_blocks_are_not_sharded_ones(experts: str) -> None:
    """What is offloaded takes turns anyway."""
    assert Memory(transformer="offload", experts=experts).transformer == "offload"  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="shards stay on their devices; swap needs transformer: repli"):
        Memory(experts="swap", transformer="shard")
