"""Every shipped YAML file is valid, and a bad one is explained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from runtime.errors import BadRequestError
from runtime.forecasting.calibration import load_calibration
from runtime.forecasting.presets import Preset, load_preset
from runtime.models.folder import find_model
from runtime.request.config import AUTO, EMBEDDED_MODELS, available, embedded_models, load_config, shipped
from spectrum import FixedSchedule, StepKind


@pytest.mark.parametrize("name", available("."))
def test_shipped_configs_make_valid_requests_with_a_preset_that_exists(name: str) -> None:
    config = load_config(name)
    request = config.request("x")
    assert request.spectrum in (AUTO, "off")
    assert config.architecture is not None


@pytest.mark.parametrize(("name", "nfe"), [("off", 50), ("paper", 14), ("paper-fast", 10)])
def test_shipped_presets_compute_the_published_number_of_steps(name: str, nfe: int) -> None:
    preset = load_preset(name)
    schedule = preset.schedule.build(50)
    assert isinstance(schedule, FixedSchedule)
    assert schedule.nfe == nfe
    assert preset.forecasts == (nfe < 50)


@pytest.mark.parametrize("nfe", [14, 10, 8])
def test_shipped_plans_compute_as_many_steps_as_they_say(nfe: int) -> None:
    preset = load_preset(f"planned-{nfe}")
    kinds = preset.expected_kinds(50)
    assert kinds.count(StepKind.COMPUTE) == nfe
    assert preset.stream == "guided"
    preset.check_request(load_config("wan-tiny").request("x"))
    with pytest.raises(BadRequestError, match="steps 50, not 30"):
        preset.check_request(load_config("wan-tiny").request("x", steps=30))


def preset_of(folder: Path, text: str) -> Preset:
    path = folder / "switch.yaml"
    path.write_text(text)
    return load_preset(str(path))


def test_what_becomes_of_a_history_at_a_switch_is_part_of_a_preset(tmp_path: Path) -> None:
    linear = "stream: guided\nschedule: {kind: paper}\npredictor: {kind: linear}\n"
    calibrated = linear.replace("linear", "calibrated") + "calibration: wan-tiny\n"
    default = preset_of(tmp_path, linear)
    assert (default.crossing.history, default.crossing.warmup) == (None, None)  # as the model says
    assert "switch" not in default.identity
    assert preset_of(tmp_path, calibrated).crossing.history == "carried"
    assert preset_of(tmp_path, calibrated.replace("guided", "feature")).crossing.history is None
    fresh = preset_of(tmp_path, calibrated + "switch: {history: fresh, warmup: 3}\n")
    assert (fresh.crossing.history, fresh.crossing.warmup) == ("fresh", 3)
    assert fresh.identity["switch"] == {"history": "fresh", "warmup": 3}
    for text, said in (
        ("schedule: {kind: paper}\nswitch: {history: carried}\n", "a feature of one expert cannot forecast"),
        (linear + "switch: {history: carried, warmup: 2}\n", "warmup: not with history: carried"),
        (linear + "switch: {warmup: 0}\n", "switch.warmup: 0 given"),
    ):
        with pytest.raises(BadRequestError, match=said):
            preset_of(tmp_path, text)


def test_a_plan_computes_what_begins_a_history_within_its_budget(tmp_path: Path) -> None:
    text = shipped("spectrum", "planned-10.yaml").read_text()
    preset = preset_of(tmp_path, text + "switch: {history: fresh}\n")
    kinds = preset.expected_kinds(50, {30: 3})
    assert kinds[30:33] == [StepKind.COMPUTE] * 3 and kinds.count(StepKind.COMPUTE) == 10
    with pytest.raises(BadRequestError, match="does not fit 50 steps: nfe must be within 11"):
        preset.schedules_of(50, ("cond",), {30: 10})


def test_whatever_a_list_of_steps_says_an_expert_begins_with_computed_ones(tmp_path: Path) -> None:
    preset = preset_of(tmp_path, "schedule: {kind: explicit, computed: [0, 1, 8]}\n")
    computed = [step for step, kind in enumerate(preset.expected_kinds(10, {5: 2})) if kind == "compute"]
    assert computed == [0, 1, 5, 6, 8]


def test_a_calibration_counts_by_its_content(tmp_path: Path) -> None:
    copy = tmp_path / "copy.json"
    copy.write_bytes(shipped("calibrations", "wan-tiny.json").read_bytes())
    path = tmp_path / "mine.yaml"
    text = shipped("spectrum", "planned-14.yaml").read_text()
    path.write_text(text.replace("calibration: wan-tiny", f"calibration: {copy}"))
    assert load_preset(str(path)).identity == load_preset("planned-14").identity
    content = json.loads(copy.read_text())
    content["sensitivity"][3] *= 2
    copy.write_text(json.dumps(content))
    assert load_preset(str(path)).identity != load_preset("planned-14").identity


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
        ("schedule: {kind: planned, nfe: 9}", "need a calibration"),
        ("schedule: {kind: paper}\ncalibration: wan-tiny", "need a calibration"),
        ("schedule: {kind: fitted, nfe: 9}\ncalibration: wan-tiny", "fitted schedule needs the calibrated"),
        (
            "schedule: {kind: fitted, nfe: 9}\npredictor: {kind: calibrated}\ncalibration: wan-tiny",
            "stream: feature given; a fitted solver needs guided",
        ),
        ("schedule: {kind: planned, nfe: 9}\ncalibration: wan-tiny", "needs the calibrated predictor"),
        ("schedule: {kind: paper}\nstream: guided\nuncond: {kind: full}", "both branches together"),
        ("schedule: {kind: error, budget: 1}", "budget"),
        ("- 1", "given"),
        ("", "it is empty"),
    ],
)
def test_a_bad_preset_file_is_explained(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(BadRequestError, match="spectrum") as caught:
        load_preset(str(path))
    assert said in str(caught.value)


@pytest.mark.parametrize("name", embedded_models())
def test_an_embedded_model_has_a_calibration_of_its_own_and_no_folder_of_its_maker(name: str) -> None:
    revision = find_model(load_config(name)).revision
    assert load_calibration(name).conditions.revision == revision
    for path in (EMBEDDED_MODELS / name).glob("*/config.json"):
        assert "_name_or_path" not in json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", embedded_models())
def test_a_shipped_calibration_is_of_prompts_that_its_model_understands(name: str) -> None:
    """Each word is a token; others are spelt in letters, and the videos are noise without a subject."""
    tokenizer = Tokenizer.from_file(str(EMBEDDED_MODELS / name / "tokenizer" / "tokenizer.json"))
    for prompt in load_calibration(name).prompts:
        words = [f"▁{word}" for word in prompt.split()]
        assert tokenizer.encode(prompt, add_special_tokens=False).tokens == words
