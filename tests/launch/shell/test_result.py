"""What a finished job prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.shell.run import print_result
from launch.shell.terminal import Terminal
from runtime.engine import Engine
from runtime.jobs.options import JobOptions
from runtime.jobs.run import run_job


def test_paths_are_printed_as_the_user_named_them(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """On Ray ranks stand in other folders, and their report has absolute paths."""
    monkeypatch.chdir(tmp_path)
    small = {"width": 32, "height": 32, "frames": 5, "steps": 1, "videos": 2, "spectrum": "off"}
    job = JobOptions.parse(prompt="a red circle", out=Path("a.mp4"), **small).job()
    report = run_job(engine, job.absolute())
    assert report.videos == [str(tmp_path / "a-1.mp4"), str(tmp_path / "a-2.mp4")]
    print_result(report, job, Terminal(stderr=True))
    out, err = capfd.readouterr()
    assert out == "a-1.mp4\na-2.mp4\n"
    assert "report a.json, picture a.png" in err
