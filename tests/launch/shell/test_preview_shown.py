"""`generate --preview FILE` in one process: there while the video is being made, gone when it is."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from launch import cli
from launch.shell.run import previewed_in
from runtime.engine import Engine
from runtime.errors import BadRequestError
from runtime.jobs.run import run_job
from runtime.request.outputs import Outputs, is_preview
from runtime.sampling.denoise import StepRecord
from tests.jobs import PROMPT, job_of
from tests.runtime.test_previews import Make

pytestmark = pytest.mark.usefixtures("cached")


def test_the_file_is_there_while_steps_are_taken(engine: Engine, small: Make, tmp_path: Path) -> None:
    shown, there = tmp_path / "shown.webp", list[bool]()

    def after(record: StepRecord) -> None:
        thread.join(60) if (thread := previews._thread) else None
        there.append(is_preview(shown))

    with previewed_in(shown, engine):
        previews = engine._previews
        engine.generate(small(spectrum="off"), [Nothing()], after)
    assert there == [True] * small().steps
    assert list(tmp_path.iterdir()) == []


class Nothing:
    def write(self, frames_THW3: object) -> None:
        pass


def test_the_command_leaves_the_video_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["--size", "64x48", "--frames", "5", "--steps", "4", "--out", str(tmp_path / "a.mp4")]
    assert cli.run(["generate", PROMPT, *words, "--preview", str(tmp_path / "a.webp")]) == 0
    assert capfd.readouterr().out == f"{tmp_path / 'a.mp4'}\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.mp4", "a.png"]
    assert json.loads((tmp_path / "a.json").read_text())["preview"]["count"] >= 1


def test_a_folder_that_vanishes_is_a_warning(
    engine: Engine, small: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = tmp_path / "place"
    place.write_text("no folder")
    outputs = Outputs(tmp_path / "a.mp4", tmp_path / "a.json")
    with caplog.at_level(logging.WARNING), previewed_in(place / "a.webp", engine):
        report = run_job(engine, job_of(engine, small(), outputs))
    assert outputs.video.exists() and report.preview is not None
    assert [record.getMessage().startswith("preview:") for record in caplog.records] == [True]


def test_a_file_that_appears_while_the_model_loads_stays(engine: Engine, small: Make, tmp_path: Path) -> None:
    """The job is refused, and the user's picture is not taken for the preview that is removed at the end."""
    outputs = Outputs(tmp_path / "a.mp4", tmp_path / "a.json", preview=tmp_path / "a.webp")
    (tmp_path / "a.webp").write_bytes(b"a user's")
    with pytest.raises(BadRequestError, match="exists"), previewed_in(outputs.preview, engine):
        run_job(engine, job_of(engine, small(), outputs))
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"a user's"]
