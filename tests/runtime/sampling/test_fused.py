"""Generations whose forecasts are fused with the sampler's steps, against those that take every step."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SchedulerMixin, UniPCMultistepScheduler

from runtime.checkpoint.folder import Checkpoints
from runtime.engine import Engine
from runtime.errors import BadRequestError, NotFiniteError
from runtime.models.linear import coefficients
from runtime.parallel.ranks import Ranks
from runtime.parallel.topology import Degrees
from runtime.request.config import Config, Window, load_config
from runtime.request.video_request import VideoRequest
from runtime.request.windows import Windows
from runtime.sampling.commands import Command, Commands
from runtime.sampling.coordinator import Coordinator
from runtime.sampling.denoise import Denoising, StepRecord, denoise
from runtime.sampling.estimate import Estimate
from runtime.sampling.evaluator import Evaluator
from runtime.sampling.fused import FusedStream
from runtime.sampling.network import Network
from runtime.sampling.result import Result
from runtime.sampling.run import Run
from runtime.sampling.segments import denoise_segments
from runtime.sampling.streams import GuidedStream, Stream
from spectrum import ChebyshevRidge, FixedSchedule, StepKind
from spectrum.solver import traced
from tests.launches import Launches
from tests.ranks import WarmRanks
from tests.runtime.sampling.test_streams import COMPUTED, FORECAST, PREDICTOR, meta_network
from tests.stopping import generate, interrupt

Make = Callable[..., VideoRequest]
STEPS = 12
SCHEDULES = {
    "paper": "{kind: paper, warmup: 3, window: 2, alpha: 1.0}",
    "error": "{kind: error, warmup: 3, tolerance: 3.0, longest: 4}",
}


def write(folder: Path, schedule: str = "paper", more: str = "") -> str:
    """A preset that forecasts the guided velocity."""
    path = folder / f"{schedule}.yaml"
    path.write_text(
        f"stream: guided\nschedule: {SCHEDULES[schedule]}\n"
        f"predictor: {{kind: chebyshev, degree: 4, ridge: 0.1, blend: 0.5}}\n{more}"
    )
    return str(path)


def fusing(config: Config, **changes: Any) -> Config:
    return config.model_copy(update={"fuse_forecasts": True, **changes})


def as_bfloat16(config: Config) -> Config:
    return config.model_copy(update={"dtype": config.dtype.model_copy(update={"transformer": "bfloat16"})})


@pytest.fixture(scope="module")
def fused(config: Config) -> Engine:
    return Engine(fusing(config))


def prepared(engine: Engine, request: VideoRequest) -> Run:
    return engine.prepare(engine.plan(request))


def denoised(run: Run, ranks: Ranks) -> tuple[torch.Tensor, Result]:
    result = Result(run.plan)
    return denoise_segments(ranks, run, result), result


def off(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def perturbed(run: Run) -> Run:
    """The run with noise that is otherwise rounded: how much its result changes is no error of anyone."""
    numbers = torch.randn(run.noise_BCFHW.shape, generator=torch.Generator().manual_seed(1))
    return replace(run, noise_BCFHW=run.noise_BCFHW * (1 + 1e-6 * numbers))


def compare(plain: Engine, fused: Engine, request: VideoRequest) -> tuple[Result, Result]:
    """Same decisions, and results that differ as they do when the noise is rounded otherwise."""
    run = prepared(plain, request)
    (expected, usual), (nudged, _) = (denoised(one, plain.ranks) for one in (run, perturbed(run)))
    found, result = denoised(prepared(fused, request), fused.ranks)
    assert usual.computed == result.computed and 1 < len(result.computed["cond"]) < request.steps
    assert usual.errors.keys() == result.errors.keys()
    assert 0 < off(found, expected) < 4 * off(nudged, expected)
    return usual, result


def check_errors(usual: Result, result: Result, tolerance: float) -> None:
    for step, error in usual.errors.items():
        assert result.errors[step] == pytest.approx(error, rel=tolerance)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_results_and_decisions_are_the_same(
    engine: Engine, fused: Engine, small: Make, tmp_path: Path, schedule: str
) -> None:
    """Also where errors decide which steps are computed."""
    request = small(steps=STEPS, spectrum=write(tmp_path, schedule), videos=2)
    usual, result = compare(engine, fused, request)
    check_errors(usual, result, 1e-4)
    forecast = [step for step in result.steps if step.kind is StepKind.FORECAST]
    assert forecast and all(not step.sent for step in forecast)
    assert result.features_kept == len(result.computed["cond"])


def states(engine: Engine, request: VideoRequest) -> tuple[dict[float, torch.Tensor], Result]:
    """Noise level → latents, of each computed step."""
    seen: dict[float, torch.Tensor] = {}
    run = prepared(engine, request)
    result = Result(run.plan)

    def keep(found: Estimate) -> None:
        seen[found.noise] = found.latents_BCFHW

    denoise_segments(engine.ranks, run, result, on_estimate=keep)
    return seen, result


@pytest.mark.parametrize("half", [False, True])
def test_in_bfloat16_forecasts_are_not_rounded_in_between(
    config: Config, small: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, half: bool
) -> None:
    """With velocities in float32 the usual way gives the same states, up to where they go their own ways."""
    config = as_bfloat16(config) if half else config
    request = small(steps=STEPS, spectrum=write(tmp_path))
    usual, rounded = states(Engine(config), request)
    found, result = states(Engine(fusing(config)), request)
    check_errors(rounded, result, 0.05 if half else 1e-4)
    velocity = Network.velocity
    monkeypatch.setattr(Network, "velocity", lambda self, patches: velocity(self, patches).float())
    exact, _ = states(Engine(config), request)
    assert usual.keys() == found.keys() == exact.keys()
    zeroth, *_, first = sorted(found, reverse=True)[:4]  # steps 0, 1, 2 and 4: 3 is forecast
    assert torch.equal(found[zeroth], exact[zeroth])
    assert 0 < off(found[first], exact[first]) < (1e-3 if half else 3e-6)
    if half:
        assert off(found[first], exact[first]) < 0.2 * off(usual[first], exact[first])


@pytest.mark.parametrize(
    ("name", "scale", "given"),
    [
        ("universal-8", 1.0, {"steps": STEPS}),
        ("universal-8", 5.0, {"steps": STEPS}),
        ("planned-14", 5.0, {"steps": 50, "width": 96, "height": 96, "frames": 17}),
    ],
)
def test_with_the_weights_that_ship(
    engine: Engine, fused: Engine, small: Make, name: str, scale: float, given: dict[str, int]
) -> None:
    check_errors(*compare(engine, fused, small(spectrum=name, guidance=scale, **given)), 1e-3)


def test_windows_are_blended(config: Config, small: Make, tmp_path: Path) -> None:
    window = {"window": Window(frames=9, overlap=4)}
    request = small(steps=STEPS, frames=17, spectrum=write(tmp_path))
    compare(Engine(config.model_copy(update=window)), Engine(fusing(config, **window)), request)


@pytest.mark.parametrize("history", ["fresh", "carried"])
def test_experts_forget_or_carry_on(small: Make, tmp_path: Path, history: str) -> None:
    config = load_config("wan2.2-tiny")
    given = {"width": 64, "height": 48, "frames": 5, "steps": STEPS, "max_sequence_length": 32}
    preset = write(tmp_path, more=f"switch: {{history: {history}}}\n")
    request = config.request("a red circle", spectrum=preset, **given)
    usual, result = compare(Engine(config), Engine(fusing(config)), request)
    check_errors(usual, result, 1e-4)
    assert len({step.expert for step in result.steps}) == 2


def stepped(run: Run, computed: Collection[int]) -> torch.Tensor:
    """What the run comes to with these steps computed, whatever its preset says."""
    segment, alone = run.segment(0, None), Ranks.alone(torch.device("cpu"))
    schedule = FixedSchedule(STEPS, tuple(computed))
    coordinator = Coordinator(dict.fromkeys(run.plan.request.branches, schedule), "", alone)
    state = Denoising(segment.noise_BCFHW, segment.sampler, segment.stream, coordinator)
    assert len(list(denoise(state, alone))) == STEPS
    return state.latents_BCFHW


@pytest.mark.parametrize(
    "computed", [(0,), (0, 11), (0, 1, 2, 10), (0, 5, 6, 7), tuple(range(STEPS))], ids=str
)
def test_whichever_steps_are_computed(
    engine: Engine, fused: Engine, small: Make, tmp_path: Path, computed: tuple[int, ...]
) -> None:
    """A guard, a deadline or a command may decide at any step; nothing is handed over."""
    request = small(steps=STEPS, spectrum=write(tmp_path))
    usual, run = prepared(engine, request), prepared(fused, request)
    assert isinstance(run.segment(0, None).stream, FusedStream)
    expected = stepped(usual, computed)
    nudged = off(stepped(perturbed(usual), computed), expected)
    assert off(stepped(run, computed), expected) < 4 * nudged
    stored = replace(run, storage=torch.device("cpu"))
    assert torch.equal(stepped(stored, computed), stepped(run, computed))


def test_a_deadline_leaves_steps_out(fused: Engine, small: Make, tmp_path: Path) -> None:
    result, frames = generate(fused, small(steps=STEPS, spectrum=write(tmp_path), deadline=0.01))
    computed, dropped = result.computed["cond"], result.expectation.dropped
    assert dropped and sorted([*computed, *dropped]) == [0, 1, 2, 4, 7, 11]
    assert len(result.steps) == STEPS and frames.std() > 0


def test_a_command_computes_a_step(fused: Engine, small: Make, tmp_path: Path) -> None:
    request, commands = small(steps=STEPS, spectrum=write(tmp_path)), Commands()
    run = prepared(fused, request)

    def command(record: StepRecord) -> None:
        if record.index == 3:
            commands.give(Command.FORCE_COMPUTE)

    result = Result(run.plan)
    found = denoise_segments(fused.ranks, run, result, command, commands=commands)
    usual = [step for step, kind in enumerate(run.plan.kinds) if kind is StepKind.COMPUTE]
    added = sorted({*result.computed["cond"]} - {*usual})
    assert added == [5]
    assert torch.equal(found, stepped(run, sorted({*usual, *added})))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("until", [0, 4, 7, 10, 11])
def test_it_goes_on_in_the_same_bits(
    fused: Engine, small: Make, tmp_path: Path, schedule: str, until: int
) -> None:
    request = small(steps=STEPS, spectrum=write(tmp_path, schedule))
    whole, expected = generate(fused, request)
    interrupt(fused, request, tmp_path / "kept", until)
    result, frames = generate(fused, request, Checkpoints(tmp_path / "kept", every=1, resume=True))
    assert 0 < result.resumed_at <= until + 1
    assert np.array_equal(frames, expected)
    assert (result.digests, result.errors, result.computed) == (whole.digests, whole.errors, whole.computed)


def test_experts_go_on_in_the_same_bits(tmp_path: Path) -> None:
    """A history that was dropped, and one that is younger than the expert, are as they were."""
    config = fusing(load_config("wan2.2-tiny"))
    given = {"width": 64, "height": 48, "frames": 5, "steps": STEPS, "max_sequence_length": 32}
    preset = write(tmp_path, more="switch: {history: fresh, warmup: 2}\n")
    engine, request = Engine(config), config.request("a red circle", spectrum=preset, **given)
    whole, expected = generate(engine, request)
    switch = next(step.index for step in whole.steps if step.expert != whole.steps[0].expert)
    for until in (switch - 1, switch, STEPS - 2):
        folder = tmp_path / str(until)
        interrupt(engine, request, folder, until)
        result, frames = generate(engine, request, Checkpoints(folder, every=1, resume=True))
        assert 0 < result.resumed_at <= until + 1 and np.array_equal(frames, expected)
        assert result.errors == whole.errors


def test_checkpoints_of_the_other_way_are_not_used(
    engine: Engine, fused: Engine, small: Make, tmp_path: Path
) -> None:
    """They differ by rounding, so a resumed video would be neither of the two."""
    request = small(steps=STEPS, spectrum=write(tmp_path))
    interrupt(engine, request, tmp_path / "kept", 6)
    result, frames = generate(fused, request, Checkpoints(tmp_path / "kept", every=1, resume=True))
    assert result.resumed_at == 0
    assert np.array_equal(frames, generate(fused, request)[1])


def on_ranks(ranks: Ranks, degrees: Degrees, request: VideoRequest) -> tuple[torch.Tensor, Result]:
    engine = Engine(fusing(load_config("wan-tiny")), ranks, degrees)
    return denoised(prepared(engine, request), ranks)


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    "degrees", [Degrees(cfg=2), Degrees(cfg=1, ulysses=2), Degrees(cfg=1, ring=2)], ids=str
)
def test_ranks_do_the_same(
    engine: Engine, small: Make, tmp_path: Path, warm: WarmRanks, degrees: Degrees
) -> None:
    request = small(steps=STEPS, spectrum=write(tmp_path, "error"))
    alone, usual = denoised(prepared(engine, request), engine.ranks)
    for latents, result in warm.run(2, on_ranks, degrees, request):
        assert off(latents, alone) < 1e-4
        assert result.computed == usual.computed and len(set(result.digests)) == 1


def fused_on_meta(steps: int) -> Stream:
    latents = torch.empty(1, 16, 8, 32, 32, device="meta")
    sampler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    sampler.set_timesteps(steps)
    sampler.set_begin_index(0)
    evaluator = Evaluator([meta_network(1)], Windows(8, 8, (0,)), apart=False)
    return FusedStream(evaluator, coefficients(sampler), latents, PREDICTOR)


@torch.no_grad()
def test_forecast_steps_launch_nothing_and_nothing_is_read_back() -> None:
    """On the device: of a run of forecast steps, only the next state is made, in one weighted sum."""
    latents, timestep = torch.empty(1, 16, 8, 32, 32, device="meta"), torch.empty(1, device="meta")
    stream, plain = fused_on_meta(STEPS), GuidedStream(meta_network(1), PREDICTOR)
    counts = []
    for one in (stream, plain):
        with Launches() as computing:
            for step in range(4):
                one.advance(step, COMPUTED, latents, timestep)
        assert computing.waits == []
        with Launches() as forecasting:
            for step in range(4, 8):
                one.advance(step, FORECAST, latents, timestep)
        with Launches() as next_one:
            one.advance(8, COMPUTED, latents, timestep)
        assert forecasting.waits == next_one.waits == []
        counts.append((len(forecasting.names), len(next_one.names)))
    (fused, after), (usual, after_usual) = counts
    assert fused == 0 and usual == 4 * (4 + 2)
    assert after - after_usual <= 4 + 3  # the state: one launch per node and three beside
    with Launches() as last:
        for step in range(9, STEPS):
            stream.advance(step, FORECAST, latents, timestep)
    assert last.names.count("add_") == 5 + 1 and len(last.names) <= 5 + 3


class Waits(Ranks):
    """A single rank that counts how often it waits for its device."""

    count = 0

    def synchronize(self) -> None:
        self.count += 1


@pytest.mark.parametrize(("fuse", "computed", "forecast"), [(True, 1, 0), (False, 2, 1)])
def test_a_rank_waits_for_its_device_no_more_than_it_must(
    engine: Engine, fused: Engine, small: Make, tmp_path: Path, fuse: bool, computed: int, forecast: int
) -> None:
    """A computed step once to see that the result is finite, and before a sampler that reads numbers back;
    a forecast step that has sent nothing only for the former, and a fused one not at all."""
    run = prepared(fused if fuse else engine, small(steps=STEPS, spectrum=write(tmp_path)))
    ranks = Waits.alone(torch.device("cpu"))
    counts: dict[StepKind, set[int]] = {kind: set() for kind in StepKind}
    reads: dict[StepKind, set[int]] = {kind: set() for kind in StepKind}
    segment = run.segment(0, None)
    coordinator = Coordinator(run.plan.fresh_schedules(), "", ranks)
    state = Denoising(segment.noise_BCFHW, segment.sampler, segment.stream, coordinator)
    steps = denoise(state, ranks)
    for _ in range(STEPS - 1):
        before = ranks.count
        with Launches() as launches:
            record = next(steps)
        counts[record.kind].add(ranks.count - before)
        reads[record.kind].add(len(launches.waits))
    assert counts == {StepKind.COMPUTE: {computed}, StepKind.FORECAST: {forecast}}
    if fuse:
        assert reads[StepKind.FORECAST] == {0}
        assert max(reads[StepKind.COMPUTE]) <= 3  # whether it is finite, and a squared error: two numbers
    before = ranks.count
    (record,) = steps
    assert ranks.count - before == (1 if fuse else counts[record.kind].pop())


def test_a_velocity_that_is_not_finite_is_told_at_its_step(
    fused: Engine, small: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepared(fused, small(steps=STEPS, spectrum=write(tmp_path)))
    network = run.network.at(0)
    compute = Evaluator.evaluate

    def evaluate(self: Evaluator, step: int, *given: Any) -> Any:
        found = compute(self, step, *given)
        if step == 2:
            found.parts["uncond"][0, 0] = float("nan")
            found = found._replace(velocity_BCFHW=network.velocity([*found.parts.values()]).float())
        return found

    monkeypatch.setattr(Evaluator, "evaluate", evaluate)
    with torch.no_grad(), pytest.raises(NotFiniteError, match="step 2: branch uncond produced NaN"):
        denoised(run, fused.ranks)


def test_other_streams_and_full_runs_are_left_alone(engine: Engine, fused: Engine, small: Make) -> None:
    for name in ("off", "paper", "best-8"):
        request = small(spectrum=name)
        if name == "best-8":
            request = small(spectrum=name, steps=50, width=96, height=96, frames=17)
        assert fused.plan(request).fused is None
        if name != "best-8":
            found = [denoised(prepared(one, request), one.ranks)[0] for one in (engine, fused)]
            assert torch.equal(*found)


class Clamped(FlowMatchEulerDiscreteScheduler):
    """A sampler that is not linear."""

    def step(self, *given: Any, **options: Any) -> tuple[torch.Tensor]:
        return (super().step(*given, **options)[0].clamp(-0.5, 0.5),)


@pytest.mark.parametrize(
    ("sampler", "problem"),
    [
        (Clamped(), "Clamped is not linear"),
        (
            UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, thresholding=True
            ),
            "UniPCMultistepScheduler cannot run on single numbers",
        ),
    ],
)
def test_a_sampler_that_is_not_linear_is_refused(sampler: SchedulerMixin, problem: str) -> None:
    sampler.set_timesteps(STEPS)
    sampler.set_begin_index(0)
    with pytest.raises(BadRequestError, match=f"^fuse_forecasts: the sampler {problem}"):
        coefficients(sampler)


def test_the_table_is_that_of_unit_vectors() -> None:
    tables = []
    for find in (
        coefficients,
        lambda s: traced(lambda i, v, x: s.step(v, s.timesteps[i], x, return_dict=False)[0], STEPS),
    ):
        sampler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
        sampler.set_timesteps(STEPS)
        sampler.set_begin_index(0)
        tables.append(find(sampler))
    for one, other in zip(tables[0].rows, tables[1].rows, strict=True):
        assert np.allclose(one, other, rtol=0, atol=1e-12)
    assert isinstance(PREDICTOR, ChebyshevRidge)
