"""`memory.experts: swap`: one expert is on the device at a time, and the frames are the same bits."""

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
from runtime.request.config import Config, Dtypes, Memory
from runtime.request.sampler import SamplerConfig
from runtime.request.video_request import VideoRequest
from runtime.sampling.denoise import StepRecord
from tests.conditioned import config_of, denoised_on, write_two_experts
from tests.ranks import run_ranks
from tests.stopping import stop_and_resume

SWAP = Memory(experts="swap")


@pytest.fixture(scope="module")
def own(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = write_two_experts("WanPipeline", tmp_path_factory.mktemp("two"))
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


def swapping(config: Config) -> Config:
    return config.model_copy(update={"memory": SWAP})


def size_of(expert: Expert, part: str = "") -> int:
    """Bytes of an expert's weights in a part."""
    module = expert.module.get_submodule(part)
    return sum(weight.numel() * weight.element_size() for weight in module.parameters())


def test_one_expert_is_on_the_device_at_every_step(own: Config) -> None:
    """What is there is counted after every step, and the most of it is in the report."""
    kept, engine = Engine(own), Engine(swapping(own))
    swap, (high, low) = engine.loaded.swap, engine.loaded.experts
    assert swap is not None and kept.loaded.swap is None
    held: list[int] = []

    def on_step(record: StepRecord) -> None:
        held.append(swap.held)

    frames: dict[str, FrameBuffer] = {}
    for name, one in (("keep", kept), ("swap", engine), ("again", engine)):
        frames[name] = FrameBuffer()
        result = one.generate(ask(own), [frames[name]], on_step if one is engine else lambda _: None)
        told = build_report(ModelPart(name="two", revision=""), result, [], load_seconds=0, write_seconds=0)
        memory = json.loads(told.to_json())["memory"]
        assert memory["device_peak"] is None  # of a GPU
        blocks, block = size_of(high, "blocks"), size_of(high, "blocks.0")
        beside = size_of(high) + size_of(low) - 2 * blocks
        assert memory["weights"] == beside + (2 * blocks if one is kept else blocks + block)
    assert held == [size_of(high, "blocks")] * 16
    assert (frames["keep"].frames == frames["swap"].frames).all()
    assert (frames["keep"].frames == frames["again"].frames).all()


def moved(ranks: Ranks, config: Config, request: VideoRequest) -> list[tuple[str, str, bool]]:
    """Each step's expert and kind on a rank, and whether blocks changed places at it."""
    engine, found = Engine(config, ranks), []
    (high, _), before = engine.loaded.experts, []

    def places() -> list[int]:
        return [weight.data_ptr() for weight in high.module.blocks.parameters()]

    def on_step(record: StepRecord) -> None:
        now = places()
        found.append((record.expert, str(record.kind), now != before[-1]))
        before.append(now)

    before.append(places())
    engine.generate(request, [FrameBuffer()] if ranks.is_leader else [], on_step)
    return found


@pytest.mark.timeout(240)
def test_experts_change_places_at_the_first_computed_step_of_one_and_at_no_other(
    own: Config, tmp_path: Path
) -> None:
    path = tmp_path / "guided.yaml"
    path.write_text(
        "stream: guided\nschedule: {kind: explicit, computed: [0, 1, 2, 7]}\npredictor: {kind: linear}\n"
        "switch: {history: carried}\n"
    )
    told = run_ranks(2, moved, swapping(own), ask(own, spectrum=str(path)))
    assert told[0] == told[1]
    low = [step for step, (expert, _, _) in enumerate(told[0]) if expert == "transformer_2"]
    assert low[0] < 7 and told[0][low[0]][1] == "forecast"  # nothing moves for a forecast
    assert [step for step, (_, _, swapped) in enumerate(told[0]) if swapped] == [7]


@pytest.mark.timeout(240)
def test_ranks_that_swap_make_what_ranks_that_keep_make(own: Config) -> None:
    request = ask(own)
    for degrees in (Degrees(cfg=2), Degrees(ulysses=2)):
        kept = run_ranks(2, denoised_on, own, request, degrees)
        swapped = run_ranks(2, denoised_on, swapping(own), request, degrees)
        assert all(torch.equal(one, kept[0]) for one in (*kept, *swapped))


def test_it_resumes_with_the_expert_that_is_needed(own: Config, tmp_path: Path) -> None:
    engine, request = Engine(swapping(own)), ask(own)
    first = engine.plan(request).course.numbers.index(1)
    at = [first - 3, first - 1]
    found = stop_and_resume(engine.ranks, swapping(own), request, tmp_path, at)
    assert [resumed for resumed, _, _ in found] == [step + 3 for step in at]
    assert all(frames and decisions for _, frames, decisions in found)


def test_weights_kept_in_another_dtype_are_swapped_as_they_are_kept(own: Config) -> None:
    dtypes = Dtypes(transformer="bfloat16", compute="float32", text_encoder="float32")
    mixed = own.model_copy(update={"dtype": dtypes})
    engines = [Engine(mixed), Engine(swapping(mixed))]
    made = [engine.generate(ask(mixed), [FrameBuffer()]).frames_sha256 for engine in engines]
    assert made[0] == made[1]
    assert engines[1].loaded.weight_bytes < engines[0].loaded.weight_bytes


def test_shards_are_not_swapped() -> None:
    with pytest.raises(ValidationError, match="shards stay on their devices; swap needs transformer: repli"):
        Memory(experts="swap", transformer="shard")
