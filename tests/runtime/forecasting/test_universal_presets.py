"""Universal presets: any number of steps, the sampler's own noise levels, and what makes them unique."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime.errors import BadRequestError
from runtime.forecasting import universal as table
from runtime.forecasting.presets import load_preset
from runtime.models.configs import open_config
from runtime.models.sampler import noise_levels
from runtime.profile import ModelProfile
from runtime.request.config import load_config
from runtime.request.sampler import SamplerConfig
from spectrum import NOWHERE, StepKind
from spectrum.universal import TABLE, universal

PRESET = "stream: guided\nschedule: {kind: universal, nfe: 10}\npredictor: {kind: universal}\n"


@pytest.mark.parametrize(("name", "nfe"), [("universal", None), ("universal-10", 10), ("universal-8", 8)])
@pytest.mark.parametrize("steps", [1, 2, 6, 8, 9, 20, 50])
def test_they_compute_as_many_steps_as_they_say_or_the_papers(name: str, nfe: int | None, steps: int) -> None:
    kinds = load_preset(name).expected_kinds(steps)
    paper = load_preset("paper").expected_kinds(steps)
    wanted = paper.count(StepKind.COMPUTE) if nfe is None else min(nfe, steps)
    assert kinds.count(StepKind.COMPUTE) == wanted and kinds[0] is StepKind.COMPUTE


@pytest.mark.parametrize("kind", ["unipc", "euler", "dpm++"])
@pytest.mark.parametrize("shift", [1.0, 12.0])
def test_a_plan_is_made_for_the_noise_levels_of_the_request(kind: str, shift: float) -> None:
    scheduler = SamplerConfig(kind=kind, shift=shift)  # type: ignore[arg-type]
    config = open_config("wan-tiny").model_copy(update={"scheduler": scheduler})
    profile = ModelProfile(config)
    request = config.request("x", steps=40, spectrum="universal-10")
    sampler = profile.fresh_sampler(request)
    levels = noise_levels(sampler)
    assert len(levels) == 41 and levels[0] == pytest.approx(1.0, abs=1e-3) and levels[-1] == 0.0
    expected = universal().planner(levels).plan(10).computed
    assert expected != universal().planner(table.levels_of(40, None)).plan(10).computed
    preset = profile.check(request)
    schedule = preset.schedules_of(40, ("cond",))["cond"]
    assert tuple(step for step in range(40) if schedule.kind(step) is StepKind.COMPUTE) == expected
    weights = preset.build_predictor(40).weights([3, 8], 11)
    assert weights.tolist() == universal().predictor(levels).weights([3, 8], 11).tolist()


def test_two_experts_carry_their_history_and_compute_no_step_more() -> None:
    config = open_config("wan2.2-tiny")
    profile = ModelProfile(config)
    request = config.request("x", spectrum="universal-8")
    preset = profile.check(request)
    assert preset.crossing.history == "carried" and profile.fresh(request, preset) == NOWHERE
    assert preset.expected_kinds(request.steps).count(StepKind.COMPUTE) == 8


def test_no_quality_is_expected_and_results_depend_on_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preset = load_preset("universal")
    computed = [step for step, kind in enumerate(preset.expected_kinds(50)) if kind is StepKind.COMPUTE]
    told = preset.expectation(50, computed, {4: 0.1}, {}, [])
    assert (told.psnr, told.deviation, told.errors) == (None, None, {})
    assert told.note == "quality not predicted for this model"
    assert "universal" not in load_preset("paper").identity
    before = preset.identity
    other = tmp_path / "other.json"
    other.write_bytes(TABLE.read_bytes() + b"\n")
    monkeypatch.setattr(table, "TABLE", other)
    table.digest.cache_clear()
    try:
        assert preset.identity != before
    finally:
        table.digest.cache_clear()


def test_more_steps_than_can_be_planned_are_refused_with_the_number() -> None:
    config = load_config("wan-tiny")
    with pytest.raises(BadRequestError, match="does not fit 201 steps: plans are made for at most 200 steps"):
        load_preset("universal").check_request(config.request("x", steps=201))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (PRESET.replace("guided", "feature"), "stream: feature given; the universal predictor needs guided"),
        (PRESET.replace("predictor: {kind: universal}\n", ""), "universal schedule needs the universal pred"),
        (PRESET.replace("guided", "velocity") + "uncond: {kind: full}\n", "a universal schedule covers both"),
        (PRESET + "calibration: wan-tiny\n", "need a calibration"),
        (PRESET.replace("nfe: 10", "nfe: 0"), "schedule.universal.nfe: 0 given"),
    ],
)
def test_a_preset_that_makes_no_sense_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(BadRequestError, match=said):
        load_preset(str(path))


def test_the_weights_go_with_other_schedules(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(PRESET.replace("{kind: universal, nfe: 10}", "{kind: paper}"))
    preset = load_preset(str(path))
    assert preset.expected_kinds(50) == load_preset("paper").expected_kinds(50)
    assert preset.build_predictor(50).memory == 2
