"""Wan2.2 A14B has one transformer for high noise and one for low: as diffusers' pipelines run them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanPipeline

from runtime.engine import Engine
from runtime.errors import BadRequestError
from runtime.media.mp4 import FrameBuffer, Frames
from runtime.models.folder import find_model
from runtime.parallel.ranks import Ranks
from runtime.parallel.topology import Degrees
from runtime.profile import ModelProfile
from runtime.request.config import Config
from runtime.request.memory import Memory
from runtime.request.video_request import VideoRequest
from runtime.sampling.result import Result
from spectrum import StepKind, paper_schedule
from tests.conditioned import EXPERTS, config_of, denoised, denoised_on, sampled, write_two_experts
from tests.ranks import run_ranks
from tests.stopping import stop_and_resume

Ask = Callable[..., VideoRequest]
SHIFT, STEPS = 12.0, 12
PRESETS = {
    "feature": "schedule: {kind: paper, warmup: 2}\n",
    "velocity": "stream: velocity\nschedule: {kind: paper, warmup: 2}\n",
    "guided": "stream: guided\nschedule: {kind: error, tolerance: 9, warmup: 2, longest: 2}\n",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_two_experts("WanPipeline", tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def own(config: Config, folder: Path) -> Config:
    return sampled(config_of(config, folder), "unipc", SHIFT)


@pytest.fixture(scope="module")
def two(own: Config) -> Engine:
    return Engine(own)


@pytest.fixture(scope="module")
def presets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("presets")
    for name, text in PRESETS.items():
        (folder / f"{name}.yaml").write_text(text)
    return {name: str(folder / f"{name}.yaml") for name in PRESETS}


@pytest.fixture(scope="module")
def ask(own: Config) -> Ask:
    def make(**fields: object) -> VideoRequest:
        given = {"width": 64, "height": 48, "frames": 5, "steps": STEPS, "guidance": 4.0, "guidance_2": 2.5}
        return own.request("a red circle", **{**given, "seed": 3, "spectrum": "off", **fields})

    return make


def generate(engine: Engine, request: VideoRequest) -> tuple[list[Frames], Result]:
    sinks = [FrameBuffer() for _ in range(request.videos)]
    result = engine.generate(request, sinks)
    return [sink.frames for sink in sinks], result


def peer_frames(engine: Engine, request: VideoRequest, **parts: object) -> list[Frames]:
    """Frames of diffusers' own pipeline, with the engine's sampler."""
    pipeline = WanPipeline.from_pretrained(engine.model.path, dtype=torch.float32, **parts)
    pipeline.text_encoder.float()
    pipeline.scheduler = type(engine.profile.sampler).from_config(engine.profile.sampler.config)
    pipeline.set_progress_bar_config(disable=True)
    frames = pipeline(
        prompt=request.prompt, negative_prompt=request.negative, width=64, height=48, num_frames=5,
        num_inference_steps=request.steps, guidance_scale=request.guidance,
        guidance_scale_2=request.guidance_2, num_videos_per_prompt=request.videos,
        generator=torch.Generator().manual_seed(request.seed),
    ).frames  # fmt: skip
    return [np.rint(video * np.float32(255)).astype(np.uint8) for video in frames]


def switch(engine: Engine, request: VideoRequest) -> int:
    """The first step of the second expert."""
    return engine.plan(request).course.numbers.index(1)


@pytest.mark.parametrize("kind", ["unipc", "euler", "dpm++"])
@pytest.mark.parametrize(
    ("guidance", "guidance_2"), [(4.0, 2.5), (4.0, None), (4.0, 1.0), (1.0, None), (1.0, 3.0)]
)
def test_with_nothing_skipped_it_is_the_pipeline_to_the_bit(
    two: Engine, own: Config, ask: Ask, kind: str, guidance: float, guidance_2: float | None
) -> None:
    engine = two if kind == "unipc" else Engine(sampled(own, kind, SHIFT))
    request = ask(guidance=guidance, guidance_2=guidance_2, videos=2, negative="a blue square")
    frames, result = generate(engine, request)
    for ours, theirs in zip(frames, peer_frames(engine, request), strict=True):
        assert np.array_equal(ours, theirs)
    assert [step.expert for step in result.steps] == [EXPERTS[step.timestep < 875] for step in result.steps]
    assert {step.expert for step in result.steps} == set(EXPERTS)


def test_each_guidance_is_that_of_its_expert(two: Engine, ask: Ask) -> None:
    """One step of each: the first scale changes what the first expert makes, and the second only the rest."""
    seen: dict[str, list[torch.Tensor]] = {}
    for name, scales in {"both": (4.0, 2.5), "high": (5.0, 2.5), "low": (4.0, 3.5)}.items():
        request = ask(guidance=scales[0], guidance_2=scales[1])
        run = two.prepare(two.plan(request))
        stream, latents = run.open_stream(), run.noise_BCFHW
        kinds = dict.fromkeys(request.branches, StepKind.COMPUTE)
        last = switch(two, request)
        seen[name] = [stream.advance(step, kinds, latents, torch.tensor([500.0]))[0] for step in (0, last)]
    for scale, changed in (("high", [True, False]), ("low", [False, True])):
        differs = [not torch.equal(one, other) for one, other in zip(seen["both"], seen[scale], strict=True)]
        assert differs == changed


@pytest.mark.parametrize(
    ("missing", "boundary"), [(None, None), ("transformer", 1.0), ("transformer_2", 0.0)]
)
def test_an_expert_may_be_missing_if_no_step_belongs_to_it(
    config: Config, ask: Ask, tmp_path: Path, missing: str | None, boundary: float | None
) -> None:
    parts = {"boundary_ratio": boundary, missing or "transformer_2": None}
    folder = write_two_experts("WanPipeline", tmp_path / "one", **parts)
    assert not (folder / (missing or "transformer_2")).exists()
    engine = Engine(sampled(config_of(config, folder), "unipc", SHIFT))
    request = ask(guidance_2=None)
    frames, result = generate(engine, request)
    assert np.array_equal(frames[0], peer_frames(engine, request)[0])
    assert {step.expert for step in result.steps} == {EXPERTS[missing == "transformer"]}


def test_steps_of_a_missing_expert_are_refused(config: Config, ask: Ask, tmp_path: Path) -> None:
    for missing, step, timestep in (("transformer", 0, 999), ("transformer_2", 8, 857)):
        folder = write_two_experts("WanPipeline", tmp_path / missing, **{missing: None})
        profile = ModelProfile(sampled(config_of(config, folder), "unipc", SHIFT))
        said = (
            rf"it lacks {missing}, to which step {step} belongs \(timestep {timestep}\) by its boundary_ratio"
        )
        with pytest.raises(BadRequestError, match=said):
            profile.check(ask())


def changed(folder: Path, target: Path, file: str, **fields: object) -> Path:
    """Copy a model with other settings in one of its files."""
    shutil.copytree(folder, target)
    path = target / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return target


@pytest.mark.parametrize(
    ("file", "fields", "said"),
    [
        ("model_index.json", {"boundary_ratio": None}, "boundary_ratio does not say where it takes over"),
        ("model_index.json", {"boundary_ratio": 1.5}, "boundary_ratio: 1.5 given; "),
        (
            "model_index.json",
            {name: [None, None] for name in EXPERTS},
            "neither transformer nor transformer_2",
        ),
        ("transformer_2/config.json", {"ffn_dim": 64}, "its transformer and transformer_2 differ in ffn_dim"),
        (
            "transformer_2/config.json",
            {"qk_norm": None},
            "its transformer and transformer_2 differ in qk_norm",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(
    config: Config, folder: Path, tmp_path: Path, file: str, fields: dict[str, object], said: str
) -> None:
    broken = changed(folder, tmp_path / "broken", file, **fields)
    with pytest.raises(BadRequestError, match=f"cannot be used: .*{said}"):
        find_model(config_of(config, broken))


def test_weights_of_the_second_expert_are_checked_before_they_are_loaded(
    config: Config, folder: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "transformer_2" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(BadRequestError, match=r"transformer_2.*is missing"):
        find_model(config_of(config, broken))


def test_a_second_guidance_is_refused_by_a_model_of_one_transformer(config: Config, ask: Ask) -> None:
    with pytest.raises(BadRequestError, match=r"guidance_2: 2\.5 given; wan-tiny has only one transformer"):
        ModelProfile(config).check(ask())


@pytest.mark.timeout(240)
@pytest.mark.parametrize("degrees", [Degrees(cfg=2), Degrees(ulysses=2), Degrees(ring=2)], ids=str)
def test_two_ranks_make_what_one_makes(
    two: Engine, ask: Ask, presets: dict[str, str], degrees: Degrees
) -> None:
    for spectrum in ("off", presets["feature"]):
        request = ask(spectrum=spectrum)
        alone = denoised(two, request)
        first, second = run_ranks(2, denoised_on, two.config, request, degrees)
        assert torch.equal(first, second)
        assert (first - alone).norm() <= 1e-5 * alone.norm()


def steps_on(ranks: Ranks, config: Config, request: VideoRequest) -> list[tuple[str, str, str, str]]:
    """What a rank decided at every step, and its digest of all decisions."""
    engine = Engine(config, ranks)
    result = engine.generate(request, [FrameBuffer()] if ranks.is_leader else [])
    digest = result.digests[ranks.rank]
    return [(str(step.index), step.expert, str(step.kind), digest) for step in result.steps]


@pytest.mark.timeout(240)
def test_every_rank_switches_and_begins_anew_at_the_same_step(
    two: Engine, ask: Ask, presets: dict[str, str]
) -> None:
    request = ask(spectrum=presets["feature"])
    first = switch(two, request)
    told = run_ranks(2, steps_on, two.config, request)
    assert told[0] == told[1]
    experts, kinds = ([step[part] for step in told[0]] for part in (1, 2))
    assert experts == [EXPERTS[0]] * first + [EXPERTS[1]] * (STEPS - first)
    assert kinds[first] == StepKind.COMPUTE
    assert StepKind.FORECAST in kinds[:first] and StepKind.FORECAST in kinds[first:]


def preset(folder: Path, stream: str, predictor: str, switch: str, warmup: int) -> str:
    path = folder / f"{stream}-{len(switch)}.yaml"
    path.write_text(
        f"stream: {stream}\nschedule: {{kind: paper, warmup: {warmup}}}\n"
        f"predictor: {{kind: {predictor}}}\n{switch}"
    )
    return str(path)


@pytest.mark.parametrize("stream", PRESETS)
def test_the_papers_schedule_warms_up_again_after_the_switch(
    two: Engine, ask: Ask, tmp_path: Path, stream: str
) -> None:
    for warmup, switch_to in ((2, ""), (3, "switch: {history: fresh, warmup: 3}\n")):
        request = ask(spectrum=preset(tmp_path, stream, "chebyshev", switch_to, 2))
        first = switch(two, request)
        result = generate(two, request)[1]
        high, low = paper_schedule(first, warmup=2), paper_schedule(STEPS - first, warmup=warmup)
        expected = [*high.computed, *(first + step for step in low.computed)]
        assert result.computed["cond"] == result.computed["uncond"] == expected
        assert [step for step, kind in enumerate(result.plan.kinds) if kind is StepKind.COMPUTE] == expected
        assert result.features_kept == low.nfe  # nothing of the first expert is left
        assert first not in result.errors and first + 1 in result.errors


@pytest.mark.timeout(240)
@pytest.mark.parametrize("stream", ["velocity", "guided"])
def test_a_history_of_outputs_may_be_carried_across_the_switch(
    two: Engine, ask: Ask, tmp_path: Path, stream: str
) -> None:
    """The steps are then those of the schedule alone, and the first expert's values are in the forecasts."""
    request = ask(spectrum=preset(tmp_path, stream, "chebyshev", "switch: {history: carried}\n", 3))
    first, plan = switch(two, request), two.plan(request)
    computed = paper_schedule(STEPS, warmup=3).computed
    assert plan.forced == frozenset() and first not in computed
    result = generate(two, request)[1]
    assert tuple(result.computed["cond"]) == computed and result.features_kept == len(computed)
    assert [step.expert for step in result.steps] == [EXPERTS[step.index >= first] for step in result.steps]
    alone = denoised(two, request)
    for degrees in (Degrees(cfg=2), Degrees(ulysses=2)):
        one, other = run_ranks(2, denoised_on, two.config, request, degrees)
        assert torch.equal(one, other)
        assert (one - alone).norm() <= 1e-5 * alone.norm()


def test_the_first_forecast_after_the_switch_is_made_from_what_is_carried(
    two: Engine, ask: Ask, tmp_path: Path
) -> None:
    """By hand: the straight line through the last two guided velocities, both of the first expert."""
    text = "switch: {history: carried}\n"
    request = ask(spectrum=preset(tmp_path, "guided", "linear", text, 3))
    first, computed = switch(two, request), paper_schedule(STEPS, warmup=3).computed
    run = two.prepare(two.plan(request))
    sampler, stream, latents = run.plan.fresh_sampler(), run.open_stream(), run.noise_BCFHW
    velocities: dict[int, torch.Tensor] = {}
    for step, timestep in enumerate(sampler.timesteps[: first + 1]):
        kind = StepKind.COMPUTE if step in computed else StepKind.FORECAST
        kinds = dict.fromkeys(request.branches, kind)
        with torch.no_grad():
            velocities[step] = stream.advance(step, kinds, latents, timestep.expand(1)).velocity_BCFHW
        latents = sampler.step(velocities[step], timestep, latents, return_dict=False)[0]
    a, b = [step for step in computed if step < first][-2:]
    expected = velocities[b] + (first - b) / (b - a) * (velocities[b] - velocities[a])
    assert torch.allclose(velocities[first], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("stream", PRESETS)
@pytest.mark.parametrize("world", [1, 2])
def test_it_resumes_to_the_bit_on_both_sides_of_the_switch(
    two: Engine, ask: Ask, presets: dict[str, str], tmp_path: Path, world: int, stream: str
) -> None:
    request = ask(spectrum=presets[stream])
    first = switch(two, request)
    at = [first - 4, first - 3, first - 2, first - 1]  # a stop is agreed in the step after, and ends the next
    if world == 1:
        results = [stop_and_resume(two.ranks, two.config, request, tmp_path, at)]
    else:
        results = run_ranks(world, stop_and_resume, two.config, request, tmp_path, at)
    for result in results:
        assert [resumed for resumed, _, _ in result] == [step + 3 for step in at]
        assert all(frames and decisions for _, frames, decisions in result)


def shares(ranks: Ranks, config: Config, request: VideoRequest) -> tuple[torch.Tensor, list[float]]:
    """Denoised latents, and the part of each expert's blocks that this rank holds afterwards."""
    from torch.distributed.tensor import DTensor

    engine, held = Engine(config, ranks, Degrees(ulysses=ranks.size)), []
    latents = denoised(engine, request)
    for expert in engine.loaded.experts:
        weights = list(expert.module.blocks.parameters())
        own = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in weights]
        held.append(sum(one.numel() for one in own) / sum(one.numel() for one in weights))
    return latents, held


@pytest.mark.timeout(240)
def test_both_experts_are_sharded(two: Engine, ask: Ask, presets: dict[str, str]) -> None:
    request = ask(spectrum=presets["feature"])
    whole = run_ranks(2, shares, two.config, request)
    sharding = two.config.model_copy(update={"memory": Memory(transformer="shard")})
    sharded = run_ranks(2, shares, sharding, request)
    assert torch.equal(whole[0][0], sharded[0][0])
    assert [held for _, held in whole] == [[1.0, 1.0]] * 2
    for _, held in sharded:
        assert held == pytest.approx([0.5, 0.5], abs=0.01)
