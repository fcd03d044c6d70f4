"""Every shipped YAML file is valid, and a bad one is explained."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime.configs import available, load_config
from runtime.errors import BadRequestError
from runtime.presets import load_preset
from spectrum import FixedSchedule


@pytest.mark.parametrize("name", available("."))
def test_shipped_configs_make_valid_requests_with_a_preset_that_exists(name: str) -> None:
    config = load_config(name)
    request = config.request("x")
    load_preset(request.spectrum)
    assert config.architecture is not None


@pytest.mark.parametrize(("name", "nfe"), [("off", 50), ("paper", 14), ("paper-fast", 10)])
def test_shipped_presets_compute_the_published_number_of_steps(name: str, nfe: int) -> None:
    preset = load_preset(name)
    schedule = preset.schedule.build(50)
    assert isinstance(schedule, FixedSchedule)
    assert schedule.nfe == nfe
    assert preset.forecasts == (nfe < 50)


def test_preset_settings_reach_the_predictor(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "schedule: {kind: explicit, computed: [0, 1, 5]}\n"
        "predictor: {kind: chebyshev, degree: 2, ridge: 0.5, blend: 0.0, horizon: 30}\n"
    )
    preset = load_preset(str(path))
    assert preset.predictor.build(50).weights([0, 1], 3).tolist() == [
        -2.0,
        3.0,
    ]  # blend 0 is the straight line


@pytest.mark.parametrize("name", ["nope", "no/such.yaml"])
def test_an_unknown_name_is_refused_and_the_known_ones_are_listed(name: str) -> None:
    with pytest.raises(BadRequestError, match=f"spectrum: '{name}' given"):
        load_preset(name)
    with pytest.raises(BadRequestError, match=r"config: 'nope' given.*wan-tiny"):
        load_config("nope")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("schedule: [", "not valid YAML"),
        ("schedule: {kind: maybe}", "schedule"),
        ("schedule: {kind: paper, alpha: .nan}", "schedule.paper.alpha"),
        ("schedule: {kind: full}\nstreem: feature", "streem: unknown field"),
        ("schedule: {kind: full}\nstream: guessed", "stream"),
        ("schedule: {kind: planned, nfe: 9}", "needs a calibration"),
        ("schedule: {kind: paper}\ncalibration: wan-tiny", "needs a calibration"),
        ("schedule: {kind: planned, nfe: 9}\ncalibration: wan-tiny", "needs it"),
        ("schedule: {kind: paper}\nstream: guided\nuncond: {kind: full}", "both branches together"),
        ("schedule: {kind: error, budget: 1}", "budget"),
        ("- 1", "given"),
        ("", "given"),
    ],
)
def test_a_bad_preset_file_is_explained(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(BadRequestError, match="spectrum") as caught:
        load_preset(str(path))
    assert said in str(caught.value)
