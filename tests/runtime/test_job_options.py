"""A job's options: typed, bounded, and the same job whoever builds it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launch.cli import cli
from launch.commands.build_job import build_batch
from launch.film.shots import plan_film
from runtime.checkpoint.folder import Checkpoints
from runtime.errors import BadRequestError
from runtime.forecasting.presets import load_preset
from runtime.jobs.job import Job
from runtime.jobs.options import JobOptions
from runtime.parallel.topology import Degrees
from runtime.request.config import load_config
from runtime.request.outputs import Outputs
from runtime.request.video_request import VideoRequest
from tests.places import ROOT


def spoken_as(words: list[str]) -> Job:
    """The job of `lockstep generate WORDS`."""
    options = cli.commands["generate"].make_context("generate", words).params
    return build_batch(**{name: value for name, value in options.items() if name != "launcher"}).first


def test_no_output_replaces_the_calibration_of_the_preset(tmp_path: Path) -> None:
    calibration, preset = tmp_path / "mine.json", tmp_path / "mine.yaml"
    calibration.write_bytes((ROOT / "configs" / "calibrations" / "wan-tiny.json").read_bytes())
    preset.write_text(
        "stream: guided\nschedule: {kind: planned, nfe: 5}\npredictor: {kind: calibrated}\n"
        "calibration: mine.json\n"
    )
    given = {"prompt": "a red circle", "out": tmp_path / "a.mp4", "spectrum": str(preset), "overwrite": True}
    JobOptions.parse(**given).job()
    with pytest.raises(BadRequestError, match=r"^report: .*it would replace .*, given for calibration"):
        JobOptions.parse(**given, report=calibration).job()


def test_every_field_of_a_request_is_an_option() -> None:
    assert VideoRequest.model_fields.keys() - {"embedded"} <= JobOptions.model_fields.keys()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"steps": 0}, "steps: 0 given; should be greater than or equal to 1"),
        ({"width": 100}, "width: 100 given; must be a multiple of 16"),
        ({"seed": True}, "seed: True given; must be a number"),
        ({"ranks": 0}, "ranks: 0 given; should be greater than or equal to 1"),
        ({"timeout": float("nan")}, "timeout: nan given"),
        ({"checkpoint_every": -1}, "checkpoint_every: -1 given"),
        ({"lora": [{"file": "a", "scale": 2000}]}, "lora.0.scale: 2000 given"),
        ({"step": 3}, "step: unknown field; did you mean steps?"),
        ({"attention": ""}, "attention: '' given; must not be empty"),
        ({"compile": "perhaps"}, "compile: 'perhaps' given"),
        ({"prompt": " "}, "prompt: ' ' given; must not be empty"),
        ({"config": "nope"}, "config: 'nope' given; there is no such config"),
        ({"spectrum": "nope"}, "spectrum: 'nope' given; there is no such preset"),
        ({"spectrum": "planned-14", "steps": 30}, "spectrum: the calibration"),
        ({"ranks": 4, "ring": 3}, "ranks: 4 given; ring 3 cannot make that number"),
        (
            {"resume": True, "checkpoint_every": 0},
            "resume: there is nothing to resume from without checkpoints",
        ),
        ({"out": "a.gif"}, "out: 'a.gif' given; the name must end in .mp4"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_bad_option_is_refused_by_its_name(given: dict[str, Any], said: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        JobOptions.parse(**{"prompt": "a red circle", "out": "a.mp4", **given}).job()
    assert said in str(caught.value)


def test_outputs_replace_no_input(tmp_path: Path) -> None:
    tiny = (ROOT / "configs" / "wan-tiny.yaml").read_text(encoding="utf-8")
    (tmp_path / "preset.yaml").write_text("schedule: {kind: full}\n")
    for name, field in (("config", "config"), ("preset", "spectrum")):
        (tmp_path / "config.yaml").write_text(tiny)
        given = {"config": str(tmp_path / "config.yaml"), "spectrum": str(tmp_path / "preset.yaml")}
        (tmp_path / "link.mp4").unlink(missing_ok=True)
        (tmp_path / "link.mp4").symlink_to(tmp_path / f"{name}.yaml")
        with pytest.raises(BadRequestError, match=f"it would replace .*{name}.yaml', given for {field}"):
            JobOptions.parse(prompt="a", out=tmp_path / "link.mp4", overwrite=True, **given).job()


def test_a_job_from_parts_a_message_and_the_command_line_is_the_same(tmp_path: Path) -> None:
    out = tmp_path / "a.mp4"
    message = {
        "prompt": "a red circle", "config": "wan-tiny", "width": 64, "height": 48, "seed": 7, "steps": 9,
        "ranks": 2, "cfg": 2, "out": str(out), "spectrum": "paper-fast", "compare": True,
    }  # fmt: skip
    told = JobOptions.model_validate_json(json.dumps(message)).job()
    config = load_config("wan-tiny")
    request = config.request("a red circle", width=64, height=48, seed=7, steps=9, spectrum="paper-fast")
    kept = Checkpoints(tmp_path / "a.checkpoints", every=4)
    parts = Job.build(
        config, request, Outputs.named(out), compare=True, ranks=2, degrees=Degrees(cfg=2), checkpoints=kept
    )
    words = ["a red circle", "--size", "64x48", "--seed", "7", "--steps", "9", "--ranks", "2", "--cfg", "2"]
    words += ["--out", str(out), "--spectrum", "paper-fast", "--compare"]
    spoken = spoken_as(words)
    assert told == parts == spoken
    assert told.preset == load_preset("paper-fast")
    assert Job.from_json(told.to_json()) == told
    assert told.planned().recipe == parts.planned().recipe


def test_a_films_job_is_the_one_that_the_command_line_makes_of_its_request(tmp_path: Path) -> None:
    (tmp_path / "film.yaml").write_text(
        "title: One\nshots: [{id: one, prompt: a red circle, seed: 7, frames: 9, spectrum: paper}]\n"
    )
    film = plan_film(tmp_path / "film.yaml", out=tmp_path / "film", ranks=2)
    job = film.job(0)
    out = film.video(0)
    words = ["a red circle", "--seed", "7", "--frames", "9", "--spectrum", "paper", "--ranks", "2"]
    words += ["--out", str(out), "--overwrite", "--resume", "--checkpoints", str(tmp_path)]
    spoken = spoken_as(words)
    same = ("config", "request", "preset", "compare", "ranks", "degrees", "timeout", "outputs")
    assert [getattr(job, name) for name in same] == [getattr(spoken, name) for name in same]
    assert job.recipe is not None and spoken.planned().recipe is not None
    job.recipe.check_same(spoken.planned().recipe)  # type: ignore[arg-type]
