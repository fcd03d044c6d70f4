"""Calibration of a pipeline of diffusers: what is measured, what is planned from it, and what is refused."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxImg2ImgPipeline, FluxPipeline, WanPipeline

from runtime.forecasting.calibration import load_calibration
from runtime.forecasting.methods import Methods
from runtime.request.config import EMBEDDED_MODELS
from spectrum import mean_gram, surprise
from spectrum.calibration import Findings, from_triangle
from spectrum.diffusers import calibrate, disable, enable, plan, report
from spectrum.diffusers.kept import Kept, Runs
from tests.flux import CALL, flux_random
from tests.pipelines import Evaluations

STEPS = 10
PROMPTS = (
    "a large red circle on the left of a gray background",
    "a small blue square at the top of a white background",
)
UNSEEN = "a small green triangle in the middle of a black background"


def run(pipe: FluxPipeline, prompt: str = UNSEEN, seed: int = 9, steps: int = STEPS, **changes: Any) -> Any:
    generator = torch.Generator().manual_seed(seed)
    arguments = {**CALL, "generator": generator, "num_inference_steps": steps, "output_type": "latent"}
    return pipe(prompt, **arguments | changes).images


@pytest.fixture(scope="module")
def pipe() -> FluxPipeline:
    return flux_random()


@pytest.fixture(scope="module")
def file(pipe: FluxPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("calibration") / "flux.json"
    before = run(pipe)
    assert calibrate(pipe, PROMPTS, out, steps=STEPS, seed=3, progress=False, **CALL) == out
    assert torch.equal(run(pipe), before)  # nothing of it is left behind
    assert "step" not in vars(pipe.scheduler)
    assert not out.with_name(out.name + ".partial").exists()
    return out


def velocities(pipe: FluxPipeline, prompt: str, seed: int) -> list[torch.Tensor]:
    """Velocity of every step, from the latents that a pipeline hands to its callback."""
    latents: list[torch.Tensor] = []

    def see(_pipe: Any, _step: int, _time: Any, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        latents.append(values["latents"].double())
        return values

    run(pipe, prompt, seed, callback_on_step_end=see)
    moves = pipe.scheduler.sigmas.diff().double()
    return [
        (after - before) / move for before, after, move in zip(latents, latents[1:], moves[1:], strict=False)
    ]


def test_gram_matrices_are_those_of_the_velocities(pipe: FluxPipeline, file: Path) -> None:
    content = json.loads(file.read_text())
    expected = []
    for number, prompt in enumerate(PROMPTS):
        flat = torch.stack([one.flatten() for one in velocities(pipe, prompt, 3 + number)])
        expected.append((flat @ flat.T).numpy())
    found = from_triangle(content["grams"]["guided"], STEPS)[1:, 1:]
    assert np.allclose(found / np.trace(found), mean_gram(expected) / (STEPS - 1), atol=2e-3)
    assert content["grams"]["guided"] == pytest.approx(content["grams"]["velocity"])  # embedded guidance


def test_an_error_of_the_last_step_of_euler_stays_as_it_is(file: Path) -> None:
    content = json.loads(file.read_text())
    assert content["sensitivity"][-1] == pytest.approx(1.0, rel=1e-3)
    assert content["sensitivity"][1] != pytest.approx(1.0, rel=1e-2)


def test_the_file_is_one_of_lockstep_s(file: Path) -> None:
    calibration = load_calibration(str(file))
    ours = plan(file, nfe=4)
    theirs = Methods(calibration).planned(4)
    assert ours.computed == theirs.plan.computed
    assert ours.prediction == theirs.prediction
    assert calibration.conditions.pipeline == "FluxPipeline"
    assert len(calibration.trials) == 2 * 3


def test_trials_are_what_a_plan_from_the_other_prompt_gives(pipe: FluxPipeline, file: Path) -> None:
    calibration = load_calibration(str(file))
    assert [(trial.video, trial.nfe) for trial in calibration.trials] == [
        (video, nfe) for video in (0, 1) for nfe in (2, 3, 4)
    ]
    assert all(0 < trial.measured < 1 and 10 < trial.psnr < 100 for trial in calibration.trials)
    errors = [trial.measured for trial in calibration.trials]
    assert errors[2] < errors[0] and errors[5] < errors[3]  # four computed steps against two


def test_a_plan_is_followed(pipe: FluxPipeline, file: Path) -> None:
    planned = plan(file, nfe=4)
    counted = Evaluations([*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks])
    full = run(pipe)
    enable(pipe, planned)
    try:
        result = run(pipe)
        (told,) = report(pipe).values()
    finally:
        disable(pipe)
    assert told.computed == planned.computed
    assert set(counted.counts) == {STEPS + 4}
    assert 0 < float((result - full).norm() / full.norm()) < 0.5
    assert planned.planned is not None
    assert abs(surprise(told.errors, planned.planned.expected)) < 1.0  # errors are of the expected size


def changed_weight(pipe: FluxPipeline) -> FluxPipeline:
    with torch.no_grad():
        pipe.transformer.proj_out.weight[0, 0] += 1.0
    return pipe


def other_shift(pipe: FluxPipeline) -> FluxPipeline:
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, max_shift=2.0)
    return pipe


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (changed_weight, "revision '"),
        (other_shift, "sampler.max_shift 1.15, not 2.0"),
        (lambda pipe: FluxImg2ImgPipeline(**pipe.components), "pipeline 'FluxPipeline', not"),
    ],
)
def test_another_pipeline_is_refused(file: Path, change: Callable[[FluxPipeline], Any], said: str) -> None:
    pipe = change(flux_random())
    with pytest.raises(ValueError, match=r"'flux.json' does not fit this pipeline") as refused:
        enable(pipe, plan(file, nfe=4))
    assert said in str(refused.value)
    assert "hooks" not in vars(pipe.transformer.transformer_blocks[0])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_inference_steps": 12}, "steps 10, not 12"),
        ({"guidance_scale": 1.5}, "guidance 3.5, not 1.5"),
        ({"height": 128, "width": 128}, "about 2048 numbers of latents, not 8192"),
        ({"sigmas": np.linspace(1.0, 0.01, STEPS) ** 2}, "noise levels that differ by up to 0."),
    ],
)
def test_another_generation_is_refused(
    pipe: FluxPipeline, file: Path, changes: dict[str, Any], said: str
) -> None:
    enable(pipe, plan(file, nfe=4))
    try:
        with pytest.raises(ValueError, match=r"calibrate\(\.\.\.\) makes one that fits") as refused:
            run(pipe, **changes)
        assert said in str(refused.value)
        run(pipe)  # the next one that fits is not affected
        assert report(pipe)["transformer"].nfe == 4
    finally:
        disable(pipe)


def test_an_interrupted_calibration_is_resumed(pipe: FluxPipeline, file: Path, tmp_path: Path) -> None:
    out, partial = tmp_path / "flux.json", tmp_path / "flux.json.partial"
    settings: dict[str, Any] = {"steps": STEPS, "seed": 3, "progress": False, **CALL}
    counted = Evaluations([pipe.transformer.transformer_blocks[0]])
    left = [95]

    def stop(_pipe: Any, _step: int, _time: Any, values: dict[str, Any]) -> dict[str, Any]:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return values

    with pytest.raises(KeyboardInterrupt):
        calibrate(pipe, PROMPTS, out, callback_on_step_end=stop, **settings)
    assert partial.exists() and not out.exists()
    before = counted.counts[0]
    with pytest.raises(ValueError, match="another calibration"):
        calibrate(pipe, PROMPTS, out, **{**settings, "seed": 4})
    assert counted.counts[0] == before
    calibrate(pipe, PROMPTS, out, callback_on_step_end=stop, **settings)
    assert counted.counts[0] - before < before
    assert not partial.exists()
    whole, resumed = (json.loads(path.read_text()) for path in (file, out))
    same = ("grams", "trajectory", "sensitivity", "response", "scale", "trials", "noise_levels")
    assert {name: resumed[name] for name in same} == {name: whole[name] for name in same}


def test_what_is_in_the_way_is_left_alone(pipe: FluxPipeline, tmp_path: Path) -> None:
    out, partial = tmp_path / "flux.json", tmp_path / "flux.json.partial"
    partial.write_text("a poem")
    with pytest.raises(ValueError, match="cannot be read as finished runs"):
        calibrate(pipe, PROMPTS, out, steps=STEPS, **CALL)
    assert partial.read_text() == "a poem" and list(tmp_path.iterdir()) == [partial]


def test_one_file_is_made_by_one_process(pipe: FluxPipeline, tmp_path: Path) -> None:
    out = tmp_path / "flux.json"
    with (
        Kept(tmp_path / "flux.json.partial", "").alone(),
        pytest.raises(ValueError, match="another process is making this calibration"),
    ):
        calibrate(pipe, PROMPTS, out, steps=STEPS, **CALL)
    assert not list(tmp_path.iterdir())


def test_runs_that_were_kept_outlive_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Kept(tmp_path / "flux.json.partial", "mine")
    kept.write(Runs(Findings(scales=[0.5]), [np.ones((2, 2, 3), np.uint8)], {"levels": [1.0, 0.0]}))

    def full(path: Path, content: bytes) -> int:
        path.write_text("part of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        kept.write(Runs(Findings(), [], {}))
    assert list(tmp_path.iterdir()) == [kept.path]
    read = kept.read(overwrite=False)
    assert read is not None and read.found.scales == [0.5] and read.pictures[0].all()


WAN_CALL: dict[str, Any] = {
    "height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 16, "guidance_scale": 4.0,
    "guidance_scale_2": 3.0,
}  # fmt: skip


def test_two_transformers_have_one_calibration(tmp_path: Path) -> None:
    pipe = WanPipeline.from_pretrained(EMBEDDED_MODELS / "wan2.2-tiny", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    file = calibrate(pipe, PROMPTS, tmp_path / "wan.json", steps=8, progress=False, **WAN_CALL)
    conditions = load_calibration(str(file)).conditions
    assert (conditions.guidance, conditions.guidance_2, conditions.boundary) == (4.0, 3.0, 875.0)
    planned = plan(file, nfe=4)
    assert planned.computed == Methods(load_calibration(str(file))).planned(4).plan.computed
    enable(pipe, planned)
    first, second = (Evaluations([one.blocks[0].attn1]) for one in (pipe.transformer, pipe.transformer_2))

    def generate(**changes: Any) -> None:
        pipe(UNSEEN, num_inference_steps=8, output_type="latent", **WAN_CALL | changes)

    generate()
    high, low = report(pipe).values()
    assert high == low and high.computed == planned.computed and high.forecasts == 2 * 4
    of_first = sum(bool(time >= 875) for time in pipe.scheduler.timesteps[list(planned.computed)])
    assert first.counts == [2 * of_first] and second.counts == [2 * (4 - of_first)]
    assert 1 < sum(bool(time >= 875) for time in pipe.scheduler.timesteps) < 7
    with pytest.raises(ValueError, match=r"it is for guidance_2 3.0, not 5.0"):
        generate(guidance_scale_2=5.0)
    pipe.register_to_config(boundary_ratio=0.5)
    with pytest.raises(ValueError, match=r"it is for boundary 875.0, not 500.0"):
        enable(pipe, planned)


def test_a_scheduler_that_is_changed_later_is_refused(pipe: FluxPipeline, file: Path) -> None:
    before = pipe.scheduler
    enable(pipe, plan(file, nfe=4))
    try:
        pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(before.config, stochastic_sampling=True)
        with pytest.raises(ValueError, match=r"sampler.stochastic_sampling False, not True"):
            run(pipe)
    finally:
        disable(pipe)
        pipe.scheduler = before


@pytest.mark.parametrize(
    ("prompts", "changes", "said"),
    [
        (PROMPTS[0], {}, "prompts: one text given"),
        (PROMPTS[:1], {}, "prompts: 1 given"),
        (PROMPTS, {"steps": 3}, "steps: 3 given"),
        (PROMPTS, {"num_inference_steps": 5}, "num_inference_steps: calibrate"),
        (PROMPTS, {"out": "flux.yaml"}, "is a .json file"),
        (PROMPTS, {"out": "no/flux.json"}, "does not exist"),
        (PROMPTS, {"out": ".."}, "is a .json file"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(
    pipe: FluxPipeline, tmp_path: Path, prompts: Any, changes: dict[str, Any], said: str
) -> None:
    changes = dict(changes)
    out = tmp_path / changes.pop("out", "flux.json")
    with pytest.raises(ValueError, match=said):
        calibrate(pipe, prompts, out, **{"steps": STEPS, **CALL, **changes})


def test_neither_an_existing_file_nor_an_enabled_cache_is_overlooked(pipe: FluxPipeline, file: Path) -> None:
    with pytest.raises(ValueError, match="exists"):
        calibrate(pipe, PROMPTS, file, steps=STEPS, **CALL)
    enable(pipe)
    try:
        with pytest.raises(ValueError, match="a cache is enabled"):
            calibrate(pipe, PROMPTS, file, steps=STEPS, overwrite=True, **CALL)
    finally:
        disable(pipe)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("nothing", "cannot be read"),
        ("{}", "is not a calibration"),
        ('{"grams": {}, "schema": 1}', "schema 1"),
        ('{"grams": {}, "schema": 2, "conditions": {}}', "not made with a pipeline of diffusers"),
        ('{"grams": {}, "schema": 2, "conditions": {"pipeline": "FluxPipeline"}}', "is damaged"),
    ],
)
def test_what_is_no_calibration_is_refused(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "flux.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=said):
        plan(path, nfe=4)


def test_an_impossible_plan_is_refused(pipe: FluxPipeline, file: Path) -> None:
    with pytest.raises(ValueError, match="nfe must be within 1 … 10, got 11"):
        plan(file, nfe=11)
    wrong: tuple[Any, ...] = (3.5, "12", None, True)
    for nfe in wrong:
        with pytest.raises(ValueError, match=r"nfe: .* given; it must be the number of steps"):
            plan(file, nfe=nfe)
    with pytest.raises(ValueError, match="a plan is for a pipeline"):
        enable(pipe.transformer, plan(file, nfe=4), steps=STEPS)
    with pytest.raises(ValueError, match="planned for velocity"):
        enable(pipe, plan(file, nfe=4), stream="feature")
