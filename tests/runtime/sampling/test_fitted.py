"""Generations by a fitted solver, against UniPC of diffusers: its coefficients are what the solver has."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from runtime.checkpoint.folder import Checkpoints
from runtime.engine import Engine
from runtime.errors import BadRequestError
from runtime.forecasting.calibration import load_calibration
from runtime.forecasting.presets import Preset, load_preset
from runtime.media.mp4 import Frames
from runtime.parallel.ranks import Ranks
from runtime.parallel.topology import Degrees
from runtime.reports.report import ModelPart, build_report
from runtime.reports.run_picture import write_picture
from runtime.request.config import Config, Window, load_config
from runtime.request.video_request import VideoRequest
from runtime.sampling.coordinator import Coordinator
from runtime.sampling.denoise import Denoising, denoise
from runtime.sampling.estimate import Estimate
from runtime.sampling.evaluator import Evaluator
from runtime.sampling.result import Result
from runtime.sampling.run import Run
from runtime.sampling.segments import denoise_segments
from spectrum import FixedSchedule, Forecaster, StepKind
from tests.ranks import run_ranks
from tests.solvers import EXPECTED, NODES, STEPS, solver_of, write_preset
from tests.stopping import generate, interrupt

Make = Callable[..., VideoRequest]


@pytest.fixture(scope="module")
def preset(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_preset(tmp_path_factory.mktemp("fitted"))


def prepared(engine: Engine, request: VideoRequest) -> Run:
    return engine.prepare(engine.plan(request))


def denoised(run: Run, computed: tuple[int, ...]) -> Denoising:
    """What the run comes to with these steps computed, whatever its preset says."""
    segment = run.segment(0, None)
    schedule, alone = FixedSchedule(STEPS, computed), Ranks.alone(torch.device("cpu"))
    coordinator = Coordinator(dict.fromkeys(run.plan.request.branches, schedule), "", alone)
    state = Denoising(segment.noise_BCFHW, segment.sampler, segment.stream, coordinator)
    assert len(list(denoise(state, alone))) == STEPS
    return state


@torch.no_grad()
def velocity(run: Run, step: int, latents: torch.Tensor) -> torch.Tensor:
    """Guided velocity of a video of one window."""
    network = run.network.at(step)
    timestep = run.plan.fresh_sampler().timesteps[step].expand(len(latents))
    return network.compute(latents, network.time(timestep)).velocity_BCFHW


@torch.no_grad()
def sampled(run: Run, latents: torch.Tensor, begin: int, known: dict[int, torch.Tensor], computed: set[int]):
    """The sampler from step `begin` on, with what it has not computed forecast from the last two values."""
    assert run.plan.preset.calibrated is not None
    sampler = run.plan.fresh_sampler()
    sampler.set_begin_index(begin)
    forecaster = Forecaster(run.plan.preset.calibrated.predictor("guided"))
    for step, value in known.items():
        forecaster.record(step, value)
    for step in range(begin, STEPS):
        if step in computed and step not in known:
            forecaster.record(step, velocity(run, step, latents))
        v = forecaster.at(step)
        latents = sampler.step(v, sampler.timesteps[step], latents, return_dict=False)[0]
    return latents


@torch.no_grad()
def placed(run: Run, nodes: tuple[int, ...]) -> list[torch.Tensor]:
    """diffusers' sampler with its steps at the nodes alone: its predicted states y_0 … y_N."""
    sampler = run.plan.fresh_sampler()
    kept = list(nodes)
    sampler.sigmas = torch.cat([sampler.sigmas[kept], sampler.sigmas[-1:]])
    sampler.timesteps, sampler.num_inference_steps = sampler.timesteps[kept], len(kept)
    states = [run.noise_BCFHW]
    for node, timestep in zip(nodes, sampler.timesteps, strict=True):
        v = velocity(run, node, states[-1])
        states.append(sampler.step(v, timestep, states[-1], return_dict=False)[0])
    return states


def off(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize(("scale", "joint"), [(5.0, False), (5.0, True), (1.0, True)])
def test_with_unipc_s_coefficients_it_is_unipc_at_its_nodes(
    engine: Engine, small: Make, tmp_path: Path, scale: float, joint: bool
) -> None:
    """With the branches apart, with the guided velocity alone, and without guidance."""
    name = write_preset(tmp_path, scale=scale, joint=joint)
    run = prepared(engine, small(steps=STEPS, guidance=scale, spectrum=name))
    state, states = denoised(run, NODES), placed(run, NODES)
    assert off(state.latents_BCFHW, states[-1]) < 1e-3
    values = len(NODES) * (1 if joint else 2)
    assert state.stream.bytes == (1 + values) * run.noise_BCFHW.numel() * 4
    assert state.stream.kept == len(NODES)


def test_steps_between_nodes_run_nothing_and_move_nothing(engine: Engine, small: Make, preset: str) -> None:
    run = prepared(engine, small(steps=STEPS, spectrum=preset))
    segment, calls = run.segment(0, None), 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    module = engine.loaded.experts[0].module
    hooks = [
        module.patch_embedding.register_forward_hook(count),
        module.proj_out.register_forward_hook(count),
    ]
    try:
        latents, kinds = segment.noise_BCFHW, {}
        for step in range(STEPS):
            kind = StepKind.COMPUTE if step in NODES else StepKind.FORECAST
            kinds = dict.fromkeys(("cond", "uncond"), kind)
            before = calls
            with torch.no_grad():
                output = segment.stream.advance(
                    step, kinds, latents, segment.sampler.timesteps[step : step + 1]
                )
            assert output.moved is not None
            if kind is StepKind.FORECAST:
                assert calls == before and output.moved.after_BCFHW is latents
            latents = output.moved.after_BCFHW
    finally:
        for hook in hooks:
            hook.remove()
    assert calls > 0
    assert segment.sampler.step_index is None  # the sampler has done nothing at all


def test_where_a_node_is_left_out_the_sampler_goes_on(engine: Engine, small: Make, preset: str) -> None:
    run = prepared(engine, small(steps=STEPS, spectrum=preset))
    for left_out, later in ((7, {20, 40}), (40, set()), (3, {20, 30})):
        done = tuple(node for node in NODES if node < left_out)
        states = placed(run, NODES)[: len(done) + 1]
        known = {node: velocity(run, node, states[k]) for k, node in enumerate(done)}
        expected = sampled(run, states[-1], left_out, known, later)
        state = denoised(run, (*done, *sorted(later)))
        assert off(state.latents_BCFHW, expected) < 1e-3
        assert state.stream.kept == min(2, len(done) + len(later))


def test_where_a_step_between_nodes_is_computed_the_sampler_walks_there(
    engine: Engine, small: Make, preset: str
) -> None:
    run = prepared(engine, small(steps=STEPS, spectrum=preset))
    for added, later in ((1, {3, 7}), (13, {20, 40}), (8, {9}), (49, set())):
        done = tuple(node for node in NODES if node < added)
        states, last = placed(run, NODES), done[-1]
        known = {node: velocity(run, node, states[k]) for k, node in enumerate(done)}
        expected = sampled(run, states[len(done) - 1], last, known, {added, *later})
        state = denoised(run, (*done, added, *sorted(later)))
        assert off(state.latents_BCFHW, expected) < 1e-3


def test_previews_are_of_the_latents_that_were_evaluated(engine: Engine, small: Make, preset: str) -> None:
    run = prepared(engine, small(steps=STEPS, spectrum=preset))
    seen: list[Estimate] = []
    denoise_segments(Ranks.alone(torch.device("cpu")), run, Result(run.plan), on_estimate=seen.append)
    for node, state, estimate in zip(NODES, placed(run, NODES), seen, strict=False):
        assert off(estimate.latents_BCFHW, state) < 1e-3
        assert off(estimate.velocity_BCFHW, velocity(run, node, state)) < 1e-2
    assert len(seen) == len(NODES)


def interrupted(engine: Engine, request: VideoRequest, folder: Path, until: int) -> tuple[Result, Frames]:
    interrupt(engine, request, folder, until)
    return generate(engine, request, Checkpoints(folder, every=1, resume=True))


@pytest.mark.parametrize("until", [0, 3, 5, 7, 25, 49])
def test_it_goes_on_in_the_same_bits(
    engine: Engine, small: Make, preset: str, tmp_path: Path, until: int
) -> None:
    request = small(steps=STEPS, spectrum=preset)
    whole, expected = generate(engine, request)
    result, frames = interrupted(engine, request, tmp_path, until)
    assert 0 < result.resumed_at <= until + 1
    assert np.array_equal(frames, expected)
    assert (result.digests, result.errors, result.computed) == (whole.digests, whole.errors, whole.computed)
    assert result.expectation == whole.expectation


@pytest.mark.parametrize("until", [3, 5, 6, 20, 30])
def test_after_a_hand_over_it_goes_on_in_the_same_bits(
    engine: Engine, small: Make, tmp_path: Path, until: int
) -> None:
    """A guard that is never content adds the middle of the gap after step 3, which is step 5."""
    request = small(steps=STEPS, spectrum=write_preset(tmp_path, more=", guard: 1.0e-6, most: 1"))
    whole, expected = generate(engine, request)
    assert whole.expectation.added == [5] and whole.expectation.handed_over == 5
    assert whole.computed["cond"] == [0, 3, 5, 7, 20, 40]
    result, frames = interrupted(engine, request, tmp_path / "kept", until)
    assert 0 < result.resumed_at <= until + 1
    assert np.array_equal(frames, expected)
    assert (result.digests, result.errors) == (whole.digests, whole.errors)
    assert result.expectation == whole.expectation
    assert result.expectation.errors[3] == EXPECTED  # of the solver; the sampler's are known for every step
    assert set(result.expectation.errors) == {3, *range(5, STEPS)}


def test_a_deadline_hands_over_and_is_said_to(engine: Engine, small: Make, preset: str) -> None:
    request = small(steps=STEPS, spectrum=preset, deadline=0.01)
    result, frames = generate(engine, request)
    expectation = result.expectation
    assert result.computed["cond"] == [0]  # the second step that is timed leaves no time for another
    assert expectation.dropped == list(NODES[1:]) and expectation.handed_over == NODES[1]
    assert frames.std() > 0


def test_what_is_expected_and_measured_is_told(
    engine: Engine, small: Make, preset: str, tmp_path: Path
) -> None:
    request = small(steps=STEPS, spectrum=preset)
    result, _ = generate(engine, request)
    run = prepared(engine, request)
    states, evaluator = placed(run, NODES), Evaluator(run.networks, run.plan.windows, apart=True)
    found = [
        evaluator.evaluate(node, state, run.plan.fresh_sampler().timesteps[node : node + 1])
        for node, state in zip(NODES, states, strict=False)
    ]
    for before, node, one in zip(found, NODES[1:], found[1:], strict=False):
        error = off(before.values_BCFHW[0], one.velocity_BCFHW)
        assert result.errors[node] == pytest.approx(error, rel=0.02)
    known = result.expectation
    assert known.errors == dict.fromkeys(NODES[1:], EXPECTED)
    odd = sum(math.log10(error / EXPECTED) for error in result.errors.values()) / len(result.errors)
    assert known.psnr == pytest.approx(30.0 - odd / 0.02)  # the line on which the trials lie
    assert known.handed_over is None
    plain = load_preset(preset).expectation(STEPS, NODES, {}, {}, [])
    assert plain.psnr == pytest.approx(26.5) and plain.deviation == pytest.approx(6**0.5, rel=0.01)
    model = ModelPart(name=engine.model.name, revision=engine.model.revision)
    report = build_report(model, result, [], load_seconds=0.0, write_seconds=0.0)
    assert report.expectation.psnr == known.psnr and report.expectation.handed_over is None
    assert [part.index for part in report.step_log if part.error is not None] == list(NODES[1:])
    write_picture(report, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000


def on_ranks(ranks: Ranks, preset: str, degrees: Degrees, request: VideoRequest) -> tuple[object, ...]:
    engine = Engine(load_config("wan-tiny"), ranks, degrees)
    run = engine.prepare(engine.plan(request))
    result = Result(run.plan)
    latents = denoise_segments(ranks, run, result)
    skipped = [sent for step, sent in zip(result.steps, result.sent, strict=True) if step.index not in NODES]
    return latents, result.digests, max(skipped), result.errors


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("world", "degrees"), [(2, Degrees(cfg=2)), (2, Degrees(cfg=1, ulysses=2)), (4, Degrees(cfg=2, ring=2))]
)
def test_ranks_solve_in_step(engine: Engine, small: Make, preset: str, world: int, degrees: Degrees) -> None:
    request = small(steps=STEPS, spectrum=preset)
    run = prepared(engine, request)
    alone = denoised(run, NODES).latents_BCFHW
    for latents, digests, sent, errors in run_ranks(world, on_ranks, preset, degrees, request):
        assert off(latents, alone) < 1e-5
        assert len(digests) == world and len(set(digests)) == 1
        assert errors.keys() == set(NODES[1:])
        assert sent < 4096 * world  # digests and commands, and nothing of the video


def test_windows_are_blended_value_by_value(config: Config, small: Make, tmp_path: Path) -> None:
    engine = Engine(config.model_copy(update={"window": Window(frames=9, overlap=4)}))
    name = write_preset(tmp_path, frames=9)
    run = prepared(engine, small(steps=STEPS, frames=17, spectrum=name))
    windows, timestep = run.plan.windows, run.plan.fresh_sampler().timesteps[:1]
    assert len(windows) > 1
    with torch.no_grad():
        found = Evaluator(run.networks, windows, apart=True).evaluate(0, run.noise_BCFHW, timestep)
        blended = torch.zeros_like(run.noise_BCFHW)
        for number, share in enumerate(windows.weights()):
            own = windows.slice(number)
            part = run.networks[number].at(0)
            v = part.compute(run.noise_BCFHW[:, :, own].contiguous(), part.time(timestep)).velocity_BCFHW
            blended[:, :, own] += share.view(-1, 1, 1) * v
    assert off(found.velocity_BCFHW, blended) < 1e-5
    assert len(found.parts) == 2 * len(windows)
    assert denoised(run, NODES).latents_BCFHW.isfinite().all()


def test_history_may_be_kept_in_host_memory(engine: Engine, small: Make, preset: str) -> None:
    run = prepared(engine, small(steps=STEPS, spectrum=preset))
    stored = replace(run, storage=torch.device("cpu"))
    assert torch.equal(denoised(stored, NODES).latents_BCFHW, denoised(run, NODES).latents_BCFHW)


def test_a_solver_that_was_not_fitted_is_refused(small: Make, engine: Engine, tmp_path: Path) -> None:
    path = Path(write_preset(tmp_path))
    path.write_text(path.read_text().replace("nfe: 5", "nfe: 6"))
    with pytest.raises(BadRequestError, match=r"has solvers of 5 computed steps"):
        engine.plan(small(steps=STEPS, spectrum=str(path)))


def test_the_digest_of_a_calibration_counts_its_solvers(tmp_path: Path) -> None:
    preset = load_preset(write_preset(tmp_path))
    shipped = load_calibration("wan-tiny")
    assert isinstance(preset, Preset) and preset.calibrated is not None
    assert preset.calibrated.digest != shipped.digest
    assert preset.calibrated.fit(5).fitted.solver.nodes == solver_of(5.0).nodes
