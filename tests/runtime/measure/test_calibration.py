"""A calibration made from nothing at a small size: what is in it, what it is good for, what it refuses."""

from __future__ import annotations

import json
import resource
import zipfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from runtime.engine import Engine
from runtime.errors import BadRequestError, JobFailedError
from runtime.forecasting.calibration import Calibration, load_calibration
from runtime.forecasting.methods import Methods
from runtime.measure.calibrate import Calibrator, check_requests
from runtime.measure.findings import PartialFile, check_partial
from runtime.measure.fit_budgets import grade
from runtime.measure.solvers import weights_of
from runtime.measure.states import StateFiles
from runtime.media.mp4 import FrameBuffer
from runtime.media.quality import psnr
from runtime.parallel.ranks import Ranks
from runtime.parallel.topology import Degrees
from runtime.reports.report import ModelPart, build_report
from runtime.request.config import Config, load_config
from runtime.request.sampler import SamplerConfig
from runtime.request.video_request import VideoRequest
from runtime.sampling.denoise import StepRecord
from runtime.sampling.evaluator import Evaluator
from runtime.sampling.result import Result
from spectrum import StepKind, StepSeconds
from spectrum.calibration import Findings, from_triangle, to_triangle
from spectrum.solver import moments_of, regress
from tests.ranks import run_ranks

STEPS, VIDEOS, FITTED = 12, 3, (2, 4)
PROMPTS = [f"a {colour} circle moving left on a gray background" for colour in ("red", "green", "blue")]
SIZE = {"width": 64, "height": 48, "frames": 5, "steps": STEPS, "max_sequence_length": 32, "spectrum": "off"}


def requests(config: Config) -> list[VideoRequest]:
    return [config.request(prompt, seed=seed, **SIZE) for seed, prompt in enumerate(PROMPTS)]


Made = tuple[Calibration, Path, list[tuple[str, StepRecord]]]
"""A calibration, its file, and all steps that it took, with the names of their runs."""


class InterruptedHereError(Exception):
    """As if the process had been killed here."""


@pytest.fixture(scope="module")
def made(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder, taken = tmp_path_factory.mktemp("calibration"), list[tuple[str, StepRecord]]()

    def on_step(name: str, record: StepRecord) -> None:
        taken.append((name, record))

    calibrator = Calibrator(
        engine, requests(engine.config), folder / "a.json.partial", on_step, fitted=FITTED
    )
    calibration = calibrator.run()
    assert sum(record.kind is StepKind.COMPUTE for _, record in taken) == calibrator.evaluations
    calibration.write(folder / "a.json")
    calibrator.forget()
    assert [path.name for path in folder.iterdir()] == ["a.json"]
    return calibration, folder / "a.json", taken


def planned(folder: Path, calibration: Path, nfe: int, more: str = "") -> str:
    path = folder / f"planned-{nfe}.yaml"
    path.write_text(
        f"stream: guided\nschedule: {{kind: planned, nfe: {nfe}{more}}}\n"
        f"predictor: {{kind: calibrated}}\ncalibration: {calibration}\n"
    )
    return str(path)


def generate(engine: Engine, request: VideoRequest) -> tuple[np.ndarray, Result]:
    sink = FrameBuffer()
    result = engine.generate(request, [sink])
    return sink.frames, result


def test_it_says_what_it_is_for(made: Made, engine: Engine) -> None:
    calibration, path, _ = made
    assert calibration.conditions.steps == STEPS
    assert calibration.conditions.revision == engine.model.revision
    assert calibration.prompts == PROMPTS
    assert load_calibration(str(path)).digest == calibration.digest
    assert json.loads(path.read_text())["schema"] == 2


def test_gram_matrices_are_of_the_streams(made: Made, engine: Engine) -> None:
    """The mean of ⟨v_i, v_j⟩ over videos, each scaled to trace n, from the latents' own path: Euler's step is
    x − Δσ v, so its velocities can be had from outside."""
    config = engine.config.model_copy(update={"scheduler": SamplerConfig(kind="euler", shift=3.0)})
    other = Engine(config)
    velocities: list[torch.Tensor] = []
    run = other.prepare(other.plan(requests(config)[0]))
    sampler = run.plan.fresh_sampler()
    latents = run.noise_BCFHW
    with torch.no_grad():
        for step, timestep in enumerate(sampler.timesteps):
            time = run.network.adapter.time(timestep.expand(1))  # type: ignore[attr-defined]
            velocities.append(run.network.compute(latents, time).velocity_BCFHW.double().flatten())  # type: ignore[attr-defined]
            latents = (
                latents
                + (sampler.sigmas[step + 1] - sampler.sigmas[step])
                * velocities[-1].view(latents.shape).float()
            )
    stacked = torch.stack(velocities)
    truth = (stacked @ stacked.T).numpy()
    path = Path(made[1]).with_name("euler.partial")
    calibrator = Calibrator(other, requests(config)[:2], path)
    calibrator._full(0)
    found = from_triangle(calibrator._found.grams[0]["guided"], STEPS)
    assert np.allclose(found, truth, rtol=1e-4)
    assert calibrator._found.gains["11"][0] == pytest.approx(1.0, rel=1e-3)  # nothing comes after it


@pytest.mark.parametrize("stream", ["feature", "velocity", "guided"])
def test_every_stream_is_calibrated(made: Made, stream: str) -> None:
    gram = made[0].gram(stream)  # type: ignore[arg-type]
    assert np.trace(gram) == pytest.approx(STEPS)
    assert np.linalg.eigvalsh(gram).min() > -1e-6


def test_a_planned_preset_does_as_planned(made: Made, engine: Engine, tmp_path: Path) -> None:
    calibration, path, _ = made
    request = engine.config.request(PROMPTS[0], **{**SIZE, "seed": 99})
    full, _ = generate(engine, request)
    values = []
    for nfe in (3, 6, 10):
        preset = planned(tmp_path, path, nfe, ", guard: null")
        frames, result = generate(engine, request.model_copy(update={"spectrum": preset}))
        plan = calibration.planner("guided").plan(nfe)
        assert result.computed["cond"] == list(plan.computed)
        expectation = result.expectation
        assert expectation.errors == {
            step: error for step, error in enumerate(plan.errors) if error is not None
        }
        assert expectation.psnr is not None and expectation.deviation is not None
        model = ModelPart(name=engine.model.name, revision=engine.model.revision)
        report = build_report(model, result, [], load_seconds=0.0, write_seconds=0.0)
        assert report.expectation.psnr == expectation.psnr
        assert [part.expected for part in report.step_log][1:] == list(plan.errors)[1:]
        assert result.forecaster_bytes == 2 * full_latent_bytes(engine, request)
        values.append(psnr(frames, full))
    assert values == sorted(values)


def full_latent_bytes(engine: Engine, request: VideoRequest) -> int:
    return int(np.prod(engine.sizes.shape(request))) * 4


def test_where_the_plan_does_not_hold_more_is_computed(made: Made, engine: Engine, tmp_path: Path) -> None:
    preset = planned(tmp_path, made[1], 5, ", guard: 0.01, most: 2")
    request = engine.config.request(PROMPTS[0], **{**SIZE, "spectrum": preset})
    _, result = generate(engine, request)
    assert len(result.expectation.added) == 2
    assert set(result.expectation.added) < set(result.computed["cond"])
    assert result.nfe == 7


def test_any_interruption_ends_in_the_same_file(made: Made, engine: Engine, tmp_path: Path) -> None:
    calibration, _, taken = made
    partial, tries, seen = tmp_path / "p", 0, 0

    def on_step(name: str, record: StepRecord) -> None:
        nonlocal seen
        seen += 1
        if seen % (len(taken) // 2) == 0:
            raise InterruptedHereError

    while True:
        tries += 1
        try:
            again = Calibrator(engine, requests(engine.config), partial, on_step, fitted=FITTED).run()
            break
        except InterruptedHereError:
            assert tries < 9
    assert tries > 1
    assert seen < 2 * len(taken)  # what was finished was not done again
    volatile = {"seconds", "made"}
    assert again.model_dump(exclude=volatile) == calibration.model_dump(exclude=volatile)


def test_a_damaged_partial_file_is_said_to_be_and_not_used(
    engine: Engine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    partial = tmp_path / "p"
    one = Calibrator(engine, requests(engine.config), partial)
    one._full(0)
    one._keep()
    whole = partial.read_bytes()
    again = Calibrator(engine, requests(engine.config), partial)
    again._resume()
    assert again._found.plain() == one._found.plain() and not caplog.records
    assert one._kept is not None
    wrong = {"identity": one._kept.identity, "found": "{}", "latents": []}
    for damage in (whole[:-100], whole[: len(whole) // 2], b"PK", b"", wrong, {**wrong, "identity": 3}):
        if isinstance(damage, bytes):
            partial.write_bytes(damage)
        else:
            torch.save(damage, partial)
        caplog.clear()
        fresh = Calibrator(engine, requests(engine.config), partial, overwrite=True)
        fresh._resume()
        assert fresh._found.grams == []
        assert isinstance(damage, dict) or "starting again" in caplog.text
        check_partial(partial)


def test_a_full_disk_is_said_to_be_full_where_findings_are_kept(tmp_path: Path) -> None:
    kept = PartialFile(tmp_path / "p", "identity", 4, (1,))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(JobFailedError, match=r"cannot write '.*p': File too large"):
            kept.write(Findings(latents=[torch.zeros(10_000)]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_what_is_kept_of_another_calibration_is_replaced_only_when_that_is_wanted(
    engine: Engine, tmp_path: Path
) -> None:
    partial = tmp_path / "p"
    Calibrator(engine, requests(engine.config), partial)._keep()
    other = requests(engine.config)[:2]
    with pytest.raises(BadRequestError, match=r"finished runs of another calibration.*--overwrite"):
        Calibrator(engine, other, partial)._resume()
    Calibrator(engine, other, partial, overwrite=True)._resume()


def test_a_foreign_file_in_the_place_of_the_partial_one_is_left_alone(engine: Engine, tmp_path: Path) -> None:
    partial = tmp_path / "p"
    with zipfile.ZipFile(tmp_path / "zip", "w") as archive:
        archive.writestr("thesis.tex", "mine")
    torch.save({"state_dict": {"weight": torch.zeros(3)}}, tmp_path / "model.pt")
    for content in (b"my notes", *((tmp_path / name).read_bytes() for name in ("zip", "model.pt"))):
        partial.write_bytes(content)
        with pytest.raises(BadRequestError, match="is not an unfinished calibration"):
            check_partial(partial)
        one = Calibrator(engine, requests(engine.config), partial, overwrite=True)
        one._resume()
        one._keep()
        assert one._kept is not None
        one._kept.remove()
        assert partial.read_bytes() == content


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c["grams"]["guided"].pop(), "need 78 numbers, got"),
        (lambda c: c["grams"]["guided"].__setitem__(0, -1.0), "grams.guided: the squared size of a step"),
        (lambda c: c["grams"]["guided"].__setitem__(0, float("nan")), "NaN, which is not a number in JSON"),
        (lambda c: c["grams"].clear(), "grams: a mapping given"),
        (lambda c: c["noise_levels"].__setitem__(1, 1e300), "noise_levels.1: 1e+300 given"),
        (lambda c: c["noise_levels"].pop(), "must have 12 steps"),
        (lambda c: c["response"].pop(), "must have 12 steps"),
        (lambda c: c["trajectory"].pop(), "trajectory: 12 steps need 91 numbers"),
        (lambda c: c["fits"][0]["nodes"].pop(), "nodes"),
        (lambda c: c["fits"][1]["rows"][1].pop(), "do not fit rows"),
        (lambda c: c["fits"][1]["forecasts"].pop(), "needs forecasts of"),
        (lambda c: c["fits"].reverse(), "ascending numbers"),
        (lambda c: c["sensitivity"].__setitem__(1, -0.5), "sensitivity.1: -0.5 given; should be greater"),
        (lambda c: c["conditions"].__setitem__("steps", 10**6), "conditions.steps: 1000000 given"),
        (lambda c: c["conditions"].__setitem__("width", 0), "conditions.width: 0 given"),
        (lambda c: c["seconds"].__setitem__("computed", 0), "seconds.computed: 0 given"),
        (lambda c: c["trials"][0].__setitem__("expected", -1), "trials.0.expected: -1 given"),
        (lambda c: c.__setitem__("scale", "x"), "scale: 'x' given"),
        (lambda c: c.__setitem__("schema", [2]), "schema a list; this version reads schema 2"),
        (
            lambda c: (c.pop("grams"), c.update(decision_digest=[], request={})),
            "is a report of `lockstep generate`, not a calibration",
        ),
        (lambda c: (c.pop("grams"), c.__setitem__("shots", [])), "is the manifest of a film, not a"),
        (lambda c: c.pop("grams"), "is some other JSON, not a calibration"),
    ],
)
def test_a_calibration_that_is_none_is_named_for_what_it_is(
    made: Made, tmp_path: Path, change: Callable[[dict[str, Any]], object], said: str
) -> None:
    content = json.loads(made[1].read_text())
    change(content)
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content))
    with pytest.raises(BadRequestError) as caught:
        load_calibration(str(path))
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[" * 100_000, "is not JSON: maximum recursion"),
        (b"[]", "is a list, not a calibration"),
        (b"", "is not JSON"),
        (b"schedule: {kind: full}", "it is a forecasting preset, not a calibration"),
        (b"\xff", "line 1: it is not UTF-8"),
        (b"9" * 5000, "is not JSON: Exceeds the limit"),
    ],
)
def test_what_is_no_json_is_no_calibration(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(BadRequestError, match=said):
        load_calibration(str(path))


def on_ranks(ranks: Ranks, folder: Path) -> tuple[Any, ...]:
    engine = Engine(load_config("wan-tiny"), ranks, Degrees(cfg=2))
    path = folder / f"{ranks.rank}.partial"
    calibrator = Calibrator(engine, requests(engine.config)[:2], path, fitted=[4])
    calibrator._full(0)
    calibrator._full(1)
    calibrator._try(0)
    calibrator._fit_all()
    found = calibrator._found
    return found.grams[0], found.gains, len(found.trials), found.fits, found.responses


@pytest.mark.timeout(180)
def test_many_ranks_find_what_one_does(engine: Engine, tmp_path: Path) -> None:
    one = Calibrator(engine, requests(engine.config)[:2], tmp_path / "alone.partial", fitted=[4])
    one._full(0)
    one._full(1)
    one._fit_all()
    (alone,) = one._found.fits
    for grams, gains, trials, fits, responses in run_ranks(2, on_ranks, tmp_path):
        assert trials == len(one.budgets)
        assert [fit["nodes"] for fit in fits] == [alone["nodes"]]
        for row, other in zip(fits[0]["rows"], alone["rows"], strict=True):
            assert np.allclose(row, other, rtol=0.01, atol=0.01)
        for step, response in one._found.responses.items():
            assert responses[step] == pytest.approx(response, rel=0.02)
        for stream, values in one._found.grams[0].items():
            assert np.allclose(grams[stream], values, rtol=1e-3), stream
        for step, gain in one._found.gains.items():
            assert gains[step] == pytest.approx(gain, rel=0.02)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": 10}, "steps 12, not 10"),
        ({"guidance": 3.0}, "guidance 5.0, not 3.0"),
        ({"width": 128, "height": 96}, "videos of about 64×48×5, not 128×96×5"),
    ],
)
def test_another_request_is_refused_with_what_differs(
    made: Made,
    engine: Engine,
    tmp_path: Path,
    changes: dict[str, float],
    said: str,
) -> None:
    preset = planned(tmp_path, made[1], 5)
    request = engine.config.request(PROMPTS[0], **{**SIZE, "spectrum": preset, **changes})
    with pytest.raises(BadRequestError, match="does not fit this request") as caught:
        engine.plan(request)
    assert said in str(caught.value)


def test_another_scheduler_or_model_is_refused(made: Made, engine: Engine, tmp_path: Path) -> None:
    calibration, path, _ = made
    preset = planned(tmp_path, path, 5)
    request = engine.config.request(PROMPTS[0], **{**SIZE, "spectrum": preset})
    shifted = Engine(engine.config.model_copy(update={"scheduler": SamplerConfig(kind="unipc", shift=5.0)}))
    with pytest.raises(BadRequestError, match=r"sampler\.flow_shift 3\.0, not 5\.0"):
        shifted.plan(request)
    other = calibration.conditions.model_copy(update={"revision": "another"})
    forged = tmp_path / "forged.json"
    calibration.model_copy(update={"conditions": other}).write(forged)
    with pytest.raises(BadRequestError, match="revision 'another', not"):
        engine.plan(request.model_copy(update={"spectrum": planned(tmp_path, forged, 5)}))


def test_what_cannot_be_calibrated_is_refused(engine: Engine, tmp_path: Path) -> None:
    alike = requests(engine.config)
    with pytest.raises(BadRequestError, match="at least 2"):
        check_requests(alike[:1])
    with pytest.raises(BadRequestError, match="only in prompt and seed"):
        check_requests([alike[0], alike[1].model_copy(update={"guidance": 2.0})])
    short = [request.model_copy(update={"steps": 3}) for request in alike]
    with pytest.raises(BadRequestError, match="steps: 3 given"):
        Calibrator(engine, short, tmp_path / "p")


def test_a_bad_file_is_explained(made: Made, tmp_path: Path) -> None:
    content = json.loads(made[1].read_text())
    for change, said in (
        (
            {"schema": 1},
            "this version reads schema 2, with which solvers can be fitted. `lockstep calibrate`",
        ),
        ({"sensitivity": [1.0]}, "sensitivity"),
        ({"grams": {"guided": [1.0]}}, "gram matrices of 12 steps need 78 numbers"),
        ({"more": 1}, "more: unknown field"),
    ):
        path = tmp_path / "bad.json"
        path.write_text(json.dumps(content | change))
        with pytest.raises(BadRequestError, match="calibration") as caught:
            load_calibration(str(path))
        assert said in str(caught.value)
    path.write_text("{")
    with pytest.raises(BadRequestError, match="is not JSON"):
        load_calibration(str(path))
    with pytest.raises(BadRequestError, match="Shipped: wan-tiny"):
        load_calibration("nope")


def test_triangles_keep_the_matrix() -> None:
    values = np.random.default_rng(0).normal(size=(6, 6))
    gram = values @ values.T
    assert np.allclose(from_triangle(to_triangle(gram), 6), gram, rtol=1e-11)


def test_plans_meet_their_budget(made: Made) -> None:
    calibration, methods = made[0], Methods(made[0])
    typical = StepSeconds(computed=1.0, forecast=0.1)
    assert methods.for_seconds(0.9 * 5 + 1.2 + 0.05, typical, "planned").plan.nfe == 5
    assert methods.for_seconds(1000.0, typical, "planned").plan.nfe == STEPS
    assert methods.for_seconds(0.9 * 5 + 1.2 + 0.05, typical, "fitted").plan.nfe == FITTED[-1]
    with pytest.raises(BadRequestError, match=r"one computed step alone needs 2\.1 s"):
        methods.for_seconds(1.5, typical)
    with pytest.raises(BadRequestError, match="1 computed steps can be afforded, and no solver"):
        methods.for_seconds(2.2, typical, "fitted")
    easy = methods.for_psnr(5.0, "planned")
    prediction = calibration.predict(calibration.planner("guided").plan(6).error)
    assert prediction is not None
    hard = methods.for_psnr(prediction.psnr, "planned")
    assert easy.plan.nfe < hard.plan.nfe <= 6
    with pytest.raises(BadRequestError, match="the best predicted value"):
        methods.for_psnr(99.0)


def test_solvers_are_tried_with_the_steps_of_the_plan(made: Made) -> None:
    calibration, _, taken = made
    for fit in calibration.fits:
        tried = defaultdict[str, set[int]](set)
        for name, record in taken:
            if name.startswith(f"solver of {fit.nfe} steps, pass"):
                tried[name].add(record.index)
        planned = set(calibration.planner("guided").plan(fit.nfe).computed)
        assert planned in [nodes | {0} for nodes in tried.values()]  # all passes share step 0
        assert len(tried) == fit.passes and fit.power in (1.0, 0.5, None)


@pytest.mark.parametrize(("better", "taken"), [(0.9, False), (1.1, True)])
def test_the_steps_of_the_plan_are_taken_where_they_are_clearly_better(better: float, taken: bool) -> None:
    errors = [0.01, 0.04, 0.02]
    planned = {"power": None, "errors": [error * 10 ** (-better / 20) for error in errors]}
    assert (grade(planned) > grade({"power": 1.0, "errors": errors})) is taken


def test_the_better_method_by_mean_and_tail_is_chosen(made: Made) -> None:
    def moved(by: float) -> Calibration:
        """Solvers whose trials are better by so many dB than the predicted PSNR of plans."""
        fits = []
        for fit in made[0].fits:
            level = made[0].predict(made[0].planner("guided").plan(fit.nfe).error)
            assert level is not None
            trials = [
                fit.trials[0].model_copy(update={"psnr": level.psnr + by + 0.1 * number})
                for number in range(8)
            ]
            fits.append(fit.model_copy(update={"trials": trials}))
        return made[0].model_copy(update={"fits": fits})

    nfe = FITTED[0]
    better, worse = Methods(moved(20.0)), Methods(moved(-20.0))
    assert better.best(nfe).method == "fitted" and worse.best(nfe).method == "planned"
    assert better.best(nfe, "planned").method == "planned" and worse.best(nfe, "fitted").method == "fitted"
    assert better.best(nfe + 4).method == "planned"  # for which no solver was fitted
    with pytest.raises(BadRequestError, match=f"nfe: {nfe + 4} given; this calibration has solvers of"):
        better.best(nfe + 4, "fitted")
    fitted = better.fitted(nfe)
    assert fitted is not None and fitted.tail is not None and fitted.prediction is not None
    assert fitted.tail == pytest.approx(fitted.prediction.psnr - 0.28)  # of eight, a tenth apart
    assert better.for_psnr(fitted.prediction.psnr - 1.0).method == "fitted"


def test_a_solver_is_the_regression_of_what_it_met(made: Made, engine: Engine, tmp_path: Path) -> None:
    """The first row has no choice of trajectories: it is fitted to x₀ and the values at x₀, by hand here."""
    calibration = made[0]
    assert [fit.nfe for fit in calibration.fits] == list(FITTED)
    assert all(len(fit.trials) == VIDEOS and fit.branches == 2 for fit in calibration.fits)
    fit = calibration.fits[1]
    last, row = fit.nodes[1], np.array(fit.rows[0])
    levels = calibration.noise_levels
    prior = np.array([1.0, *(levels[last] - levels[0]) * np.array([1.0, 5.0])])  # Euler's, as UniPC begins
    weights = weights_of([trial.measured for trial in fit.trials])
    assert len(set(weights)) > 1
    moments = []
    for request in requests(engine.config):
        run = engine.prepare(engine.plan(request))
        states, sampler = [run.noise_BCFHW], run.plan.fresh_sampler()
        with torch.no_grad():
            for step, timestep in enumerate(sampler.timesteps[:last]):
                time = run.network.at(step).time(timestep.expand(1))
                v = run.network.at(step).compute(states[-1], time).velocity_BCFHW
                states.append(sampler.step(v, timestep, states[-1], return_dict=False)[0])
            evaluator = Evaluator(run.networks, run.plan.windows, apart=True)
            values = evaluator.evaluate(0, states[0], sampler.timesteps[:1]).values_BCFHW
        moments.append(moments_of([states[0], *values], states[-1]))
    alike = regress(moments, prior, 1e-4).row
    assert np.abs(row - alike).max() < 0.05 * np.abs(alike).max()  # with other weights of videos
    assert sum(one.error(row) for one in moments) < sum(one.error(prior) for one in moments)


def test_a_fitted_preset_does_as_fitted(made: Made, engine: Engine, tmp_path: Path) -> None:
    calibration, path, _ = made
    request = engine.config.request(PROMPTS[0], **{**SIZE, "seed": 99})
    full, _ = generate(engine, request)
    for fit in calibration.fits:
        preset = tmp_path / f"{fit.nfe}.yaml"
        preset.write_text(
            f"stream: guided\nschedule: {{kind: fitted, nfe: {fit.nfe}}}\npredictor: {{kind: calibrated}}\n"
            f"calibration: {path}\n"
        )
        frames, result = generate(engine, request.model_copy(update={"spectrum": str(preset)}))
        assert result.computed["cond"] == fit.nodes
        assert result.expectation.errors == dict(zip(fit.nodes[1:], fit.expected, strict=True))
        assert result.errors.keys() == set(fit.nodes[1:])
    _, planned_result = generate(
        engine, request.model_copy(update={"spectrum": planned(tmp_path, path, fit.nfe, ", guard: null")})
    )
    assert planned_result.nfe == result.nfe
    assert psnr(frames, full) > 15.0


def test_states_that_are_gone_are_made_again(made: Made, engine: Engine, tmp_path: Path) -> None:
    partial = tmp_path / "p"
    one = Calibrator(engine, requests(engine.config), partial, fitted=[FITTED[0]])
    one.run()
    states = sorted((tmp_path / "p.states").iterdir())
    assert [path.stat().st_size for path in states] == [one._states.size] * VIDEOS
    before = states[1].read_bytes()
    states[1].unlink()
    states[2].write_bytes(before[:-1])
    again = Calibrator(engine, requests(engine.config), partial, fitted=FITTED)
    found = again.run()
    assert found.fits == made[0].fits
    assert states[1].read_bytes() == before
    again.forget()
    assert list(tmp_path.iterdir()) == []


def test_room_that_the_disk_does_not_have_is_refused_and_other_files_stay(tmp_path: Path) -> None:
    states = StateFiles(tmp_path / "states", "0123456789abcdef" * 4, (1, 2, 50, 50), 3)
    states.folder.mkdir()
    (states.folder / "mine.f32").write_text("mine")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, before[1]))
    try:
        with pytest.raises(JobFailedError, match=r"cannot write '.*values\.f32'"), states.room(3):
            pytest.fail("there was room")
        with pytest.raises(JobFailedError, match="cannot write"), states.writing(0) as write:
            for _ in range(4):
                write(torch.ones(1, 2, 50, 50))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not states.has(0)
    with states.room(2) as room, states.writing(0) as write:
        room[1] = 5.0
        for step in range(4):
            write(torch.full((1, 2, 50, 50), float(step)))
    assert states.has(0) and float(states.state(0, 2).mean()) == 2.0
    states.remove()
    assert [path.name for path in states.folder.iterdir()] == ["mine.f32"]


def test_a_solver_is_fitted_to_steps_that_there_are(engine: Engine, tmp_path: Path) -> None:
    for nfe in (0, STEPS):
        with pytest.raises(
            BadRequestError, match=f"budgets: {nfe} given; solvers of 12 steps compute 1 to 11"
        ):
            Calibrator(engine, requests(engine.config), tmp_path / "p", fitted=[nfe])
    none = Calibrator(engine, requests(engine.config), tmp_path / "p", fitted=[])
    assert none.disk == 0
    some = Calibrator(engine, requests(engine.config), tmp_path / "p", fitted=[5])
    assert some.evaluations - none.evaluations == VIDEOS * (1 + 4 * 4)


def test_the_prediction_is_a_line_through_the_trials(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    line: Callable[[float, float], float] = lambda expected, odd: 20 - 20 * np.log10(expected) - 8 * odd  # noqa: E731
    trial = made[0].trials[0]
    trials = [
        trial.model_copy(update={"expected": expected, "surprise": odd, "psnr": line(expected, odd)})
        for expected in (0.01, 0.03, 0.1)
        for odd in (-0.2, 0.1, 0.1)
    ]
    calibration = made[0].model_copy(update={"trials": trials})
    after = calibration.predict(0.05, 0.2)
    assert after is not None
    assert after.psnr == pytest.approx(line(0.05, 0.2))
    assert after.deviation == pytest.approx(0.0, abs=1e-6)
    before = calibration.predict(0.05)
    assert before is not None and before.deviation > 0.5
    assert made[0].model_copy(update={"trials": trials[:5]}).predict(0.05) is None


def test_one_video_in_which_errors_explode_does_not_decide_for_all() -> None:
    """Gains differ a hundredfold; in a root mean square the largest alone would count."""
    gains = {"1": [1.0] * 9 + [100.0], "3": [2.0] * 10}
    found = Findings(gains=gains, responses=gains)
    assert found.sensitivity(4) == found.response(4) == pytest.approx([10.9, 10.9, (10.9 * 2) ** 0.5, 2.0])
