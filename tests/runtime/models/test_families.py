"""A second family goes through the engine as Wan does, with all that Wan has not: see `tests.family`."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from runtime.engine import Engine
from runtime.errors import BadRequestError
from runtime.media.mp4 import FrameBuffer, Frames
from runtime.models.course import Course
from runtime.models.folder import expected_family, find_model
from runtime.models.registry import find_family, register
from runtime.parallel.ranks import Ranks
from runtime.parallel.topology import Degrees
from runtime.profile import ModelProfile, check_loras
from runtime.reports.report import ModelPart, build_report
from runtime.request.config import Config, Dtypes, Lora, Window, load_config
from runtime.request.memory import Memory
from runtime.request.video_request import VideoRequest
from runtime.sampling.result import Result
from spectrum import StepKind
from tests.conditioned import denoised
from tests.family import EXPERTS, TOY, shift_of, toy_config, write_toy
from tests.ranks import run_ranks
from tests.stopping import stop_and_resume

PROMPT = "a red circle moving left on a black background"
STEPS = 12
PRESETS = {
    "feature": "schedule: {kind: paper, warmup: 3}\n",
    "velocity": "stream: velocity\nschedule: {kind: paper, warmup: 3}\n",
    "guided": "stream: guided\nschedule: {kind: error, tolerance: 9, warmup: 2, longest: 2}\n",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def toy(folder: Path) -> Engine:
    return Engine(toy_config(folder))


@pytest.fixture(scope="module")
def presets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("presets")
    for name, text in PRESETS.items():
        (folder / f"{name}.yaml").write_text(text)
    return {name: str(folder / f"{name}.yaml") for name in PRESETS}


def generate(engine: Engine, request: VideoRequest) -> tuple[Result, Frames]:
    sink = FrameBuffer()
    return engine.generate(request, [sink]), sink.frames


def switch(engine: Engine, request: VideoRequest) -> int:
    """The first step of the second expert."""
    return engine.plan(request).course.numbers.index(1)


@torch.no_grad()
def by_hand(engine: Engine, request: VideoRequest) -> torch.Tensor:
    """The transformers' own forwards and diffusers' sampler, with nothing of Lockstep's loop."""
    plan = engine.plan(request)
    run, sampler = engine.prepare(plan), plan.fresh_sampler()
    latents, text = run.noise_BCFHW, engine.loaded.text.encode(request).prompts[0]
    for expert in engine.loaded.experts:
        expert.attention.restore()
    for timestep in sampler.timesteps:
        high = float(timestep) >= 600
        transformer = engine.loaded.experts[0 if high else 1].module
        guidance = request.guidance if high else request.guidance / 2
        velocity = transformer(latents, timestep.expand(len(latents)), guidance, text)
        latents = sampler.step(velocity, timestep, latents, return_dict=False)[0]
    return latents


def test_looking_for_a_family_imports_no_diffusers() -> None:
    code = (
        "import sys; from runtime.models.registry import families, find_family; "
        "assert find_family('WanVACEPipeline') is next(families()); "
        "sys.exit('diffusers' in sys.modules or 'transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


def test_a_family_is_found_by_its_pipeline(folder: Path) -> None:
    assert find_family("ToyPipeline") is TOY is find_model(toy_config(folder)).family
    with pytest.raises(ValueError, match=r"it is a FluxPipeline; supported are WanPipeline, .*, ToyPipeline"):
        find_family("FluxPipeline")
    with pytest.raises(ValueError, match="WanPipeline belongs to the family runtime"):
        register("WanPipeline", "tests.family:TOY")


def test_a_folder_in_another_layout_is_told_by_its_family(tmp_path: Path) -> None:
    save_file({"toy": torch.zeros(1)}, tmp_path / "box.safetensors")
    with pytest.raises(BadRequestError, match="cannot be used: it is a toy in a box"):
        find_model(toy_config(tmp_path))


def test_the_familys_bounds_are_those_of_a_request(folder: Path) -> None:
    config = toy_config(folder)
    assert config.request(PROMPT, width=24, frames=7).frames == 7
    for field, value, said in (
        ("frames", 8, r"must be 2k \+ 1; the nearest are 7 and 9"),
        ("frames", 103, "must be at most 101"),
        ("width", 36, "must be a multiple of 8; the nearest are 32 and 40"),
    ):
        with pytest.raises(BadRequestError, match=f"^{field}: {value} given; {said}$"):
            config.request(PROMPT, **{field: value})
    request = config.request(PROMPT)
    assert (request.guided, request.branches, request.scale) == (False, ("cond",), 3.5)
    assert VideoRequest.model_validate_json(request.model_dump_json()) == request
    with pytest.raises(BadRequestError, match=r"image: 'a\.png' given; Toy takes none"):
        ModelProfile(config).check(config.request(PROMPT, image="a.png"))


def test_a_config_with_another_familys_bounds_is_told_what_to_write(folder: Path) -> None:
    config = toy_config(folder, bounds=TOY.bounds.model_copy(update={"most_frames": 201}))
    said = (
        r"of the family Toy, write `bounds: \{pixels: 8, frames: 2, most_frames: 101, guidance: embedded\}`"
    )
    with pytest.raises(BadRequestError, match=said):
        find_model(config)


def test_loras_are_read_by_the_family_of_the_model(folder: Path) -> None:
    config = toy_config(folder, lora=[Lora(file="a.safetensors")])
    assert expected_family(config) is TOY
    with pytest.raises(BadRequestError, match=r"'a\.safetensors' given; Toy takes none"):
        check_loras(config)
    with pytest.raises(BadRequestError, match=r"'a\.safetensors' given; it cannot be read"):
        check_loras(load_config("wan-tiny").model_copy(update={"lora": config.lora}))


def test_the_samplers_shift_depends_on_the_tokens(toy: Engine) -> None:
    small, large = (toy.config.request(PROMPT, width=width) for width in (24, 104))
    tokens = [toy.profile.sizes.tokens(request) for request in (small, large)]
    assert tokens == [27, 117]
    for request, count in zip((small, large), tokens, strict=True):
        sampler = type(toy.profile.sampler).from_config(toy.profile.sampler.config)
        sampler.set_timesteps(STEPS, mu=shift_of(count))
        assert torch.equal(toy.plan(request).fresh_sampler().timesteps, sampler.timesteps)
    assert switch(toy, small) < switch(toy, large)


def test_every_step_is_of_the_expert_that_its_timestep_says(toy: Engine) -> None:
    request = toy.config.request(PROMPT, spectrum="off")
    result = generate(toy, request)[0]
    assert [record.expert for record in result.steps] == [
        EXPERTS[0 if record.timestep >= 600 else 1] for record in result.steps
    ]
    assert 0 < switch(toy, request) < STEPS - 1
    report = build_report(ModelPart(name="toy", revision=""), result, [], load_seconds=0, write_seconds=0)
    assert {step["expert"] for step in json.loads(report.to_json())["step_log"]} == set(EXPERTS)


def test_with_nothing_skipped_it_is_the_models_own_forward_to_the_bit(toy: Engine) -> None:
    request = toy.config.request(PROMPT, spectrum="off", videos=2)
    assert torch.equal(denoised(toy, request), by_hand(toy, request))


def test_a_family_refuses_what_it_cannot_do(folder: Path) -> None:
    with pytest.raises(
        BadRequestError, match=r"^performance: fast \(compiled .*\) asked for; Toy is only exact"
    ):
        Engine(toy_config(folder, performance="fast"))


def test_an_expert_begins_with_computed_steps_where_histories_are_forgotten(
    toy: Engine, presets: dict[str, str]
) -> None:
    for stream in PRESETS:
        request = toy.config.request(PROMPT, spectrum=presets[stream])
        first = switch(toy, request)
        result = generate(toy, request)[0]
        kinds = [record.kind for record in result.steps]
        assert kinds[first : first + 2] == [StepKind.COMPUTE] * 2
        assert StepKind.FORECAST in kinds[:first] and StepKind.FORECAST in kinds[first:]
        assert first not in result.errors and first + 1 in result.errors  # there was no history
        planned = toy.plan(request)
        assert planned.kinds[first] is StepKind.COMPUTE
    assert result.features_kept <= sum(kind is StepKind.COMPUTE for kind in kinds[first:])


def test_histories_of_outputs_may_be_carried_on_and_those_of_features_never(
    presets: dict[str, str], tmp_path: Path
) -> None:
    engine = Engine(toy_config(write_toy(tmp_path, history="carried")))
    requests = {name: engine.config.request(PROMPT, spectrum=preset) for name, preset in presets.items()}
    first = switch(engine, requests["guided"])
    assert engine.plan(requests["feature"]).forced == {first, first + 1}
    assert engine.plan(requests["velocity"]).forced == engine.plan(requests["guided"]).forced == frozenset()
    result = generate(engine, requests["velocity"])[0]
    computed = result.computed["cond"]
    schedule = engine.plan(requests["velocity"]).fresh_schedules()["cond"]
    assert tuple(computed) == schedule.computed  # type: ignore[attr-defined]
    assert result.features_kept == len(computed)


def test_the_course_is_that_of_the_boundaries(toy: Engine) -> None:
    settings = TOY.experts(toy.model)
    course = Course.of(settings, torch.tensor([1000.0, 600.0, 599.9, 1.0]))
    assert course.numbers == (0, 0, 1, 1)
    assert course.fresh(outputs=False) == course.fresh(outputs=True) == {2: 2}
    assert [course.forgets(step, outputs=True) for step in range(4)] == [False, False, True, False]
    alone = Course.of(settings[:1], torch.tensor([1000.0, 1.0]))
    assert (alone.numbers, alone.fresh(outputs=False)) == ((0, 0), {})


def denoised_by(
    ranks: Ranks, config: Config, given: list[VideoRequest], degrees: Degrees
) -> list[torch.Tensor]:
    engine = Engine(config, ranks, degrees)
    return [denoised(engine, request) for request in given]


@pytest.mark.timeout(240)
@pytest.mark.parametrize("degrees", [Degrees(ulysses=2), Degrees(ring=2)], ids=str)
def test_two_ranks_make_what_one_makes(toy: Engine, presets: dict[str, str], degrees: Degrees) -> None:
    """Tokens (45) and heads (3) do not divide; text tokens are on both ranks."""
    requests = [toy.config.request(PROMPT, spectrum=name) for name in ("off", *presets.values())]
    alone = [denoised(toy, request) for request in requests]
    first, second = run_ranks(2, denoised_by, toy.config, requests, degrees)
    for one, other, expected in zip(first, second, alone, strict=True):
        assert torch.equal(one, other)
        assert (one - expected).norm() <= 1e-5 * expected.norm()


def test_guidance_has_one_branch_so_ranks_share_tokens_alone(toy: Engine) -> None:
    with pytest.raises(BadRequestError, match="cfg: 2 given; without guidance there is one branch"):
        replace(toy.plan(toy.config.request(PROMPT)).topology, cfg=2).check(heads=3, tokens=45, guided=False)


def resumed_at(
    ranks: Ranks, config: Config, request: VideoRequest, root: Path, at: list[int]
) -> list[tuple[int, bool, bool]]:
    """As `stop_and_resume`, in processes that have imported this family."""
    return stop_and_resume(ranks, config, request, root, at)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("stream", PRESETS)
@pytest.mark.parametrize("world", [1, 2])
def test_it_resumes_to_the_bit_on_both_sides_of_the_switch(
    toy: Engine, presets: dict[str, str], tmp_path: Path, world: int, stream: str
) -> None:
    request = toy.config.request(PROMPT, spectrum=presets[stream])
    first = switch(toy, request)
    at = [first - 4, first - 3, first - 2, first - 1]  # a stop is agreed in the step after, and ends the next
    if world == 1:
        results = [resumed_at(toy.ranks, toy.config, request, tmp_path, at)]
    else:
        results = run_ranks(world, resumed_at, toy.config, request, tmp_path, at)
    for result in results:
        assert [resumed for resumed, _, _ in result] == [step + 3 for step in at]
        assert all(frames and decisions for _, frames, decisions in result)


@pytest.mark.timeout(240)
def test_weights_may_be_kept_in_another_dtype_than_steps_compute_in(folder: Path) -> None:
    """Kept in bfloat16 and computed in float32: as if float32 weights had been rounded once."""
    config = toy_config(folder, dtype=Dtypes(transformer="bfloat16", compute="float32"))
    engine, rounded = Engine(config), Engine(toy_config(folder))
    assert engine.loaded.dtype == torch.float32
    with torch.no_grad():
        for expert in rounded.loaded.experts:
            for name, weight in expert.module.named_parameters():
                if "guidance_in" not in name:  # which is in float32 whatever the rest is in
                    weight.copy_(weight.bfloat16())
    request = config.request(PROMPT)
    assert np.array_equal(generate(engine, request)[1], generate(rounded, request)[1])
    blocks = [weight for expert in engine.loaded.experts for weight in expert.module.blocks.parameters()]
    assert {weight.dtype for weight in blocks} == {torch.bfloat16}
    whole, shared, offloaded = (
        run_ranks(2, denoised_by, placed, [request], Degrees(ulysses=2))[0][0]
        for placed in (
            config.model_copy(update={"memory": Memory(transformer=where)})
            for where in ("replicate", "shard", "offload")
        )
    )
    assert torch.equal(whole, shared) and torch.equal(whole, offloaded)


def test_long_videos_are_made_of_windows(folder: Path) -> None:
    engine = Engine(toy_config(folder, window=Window(frames=5, overlap=2)))
    travel = ({"at": 1.0, "prompt": "a blue square"},)
    result, frames = generate(engine, engine.config.request(PROMPT, frames=11, travel=travel))
    assert (len(result.plan.windows), len(frames)) == (3, 11)
