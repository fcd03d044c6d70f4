"""A file of prompts is made by a model that is loaded once, and what an interruption left is made later."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launch import cli
from runtime.engine import Engine
from runtime.errors import JobFailedError
from runtime.jobs import run as runs
from tests.launch.commands.test_prompts import PROMPTS, TINY


def test_the_model_is_loaded_once_and_a_resumed_batch_makes_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    loaded: list[Engine] = []
    own, do = Engine.__init__, runs.run_job

    def load(engine: Engine, *given: Any) -> None:
        loaded.append(engine)
        own(engine, *given)

    def fail(engine: Engine, job: Any, *rest: Any) -> Any:
        if "blue" in job.request.prompt:
            raise JobFailedError("the disk is lost")
        return do(engine, job, *rest)

    monkeypatch.setattr(Engine, "__init__", load)
    words = ["generate", "--prompts", "prompts.txt", "--out", "out/{number:02d}-{slug}-{seed}.mp4", *TINY]
    with monkeypatch.context() as broken:
        broken.setattr(runs, "run_job", fail)
        assert cli.run([*words, "--seed", "3"]) == 3
    stdout, stderr = capfd.readouterr()
    assert stdout == "out/01-a-red-circle-3.mp4\n" and len(loaded) == 1
    assert "1 of 3 are made: the same command with --resume makes the others" in stderr
    first = (tmp_path / "out" / "01-a-red-circle-3.mp4").stat()

    assert cli.run([*words, "--seed", "3"]) == 2
    said = capfd.readouterr().err
    assert "prompts: 'prompts.txt', line 1: out: 'out/01-a-red-circle-3.mp4' exists" in said
    assert cli.run([*words, "--seed", "3", "--resume"]) == 0
    stdout, stderr = capfd.readouterr()
    names = ["out/01-a-red-circle-3.mp4", "out/02-a-blue-square-3.mp4", "out/03-a-green-star-3.mp4"]
    assert stdout.splitlines() == names and "1 of 3 requests are made already" in stderr
    assert stderr.count("resume:") == 1  # not one for each that was never begun
    assert "2 of 3 requests start at the first step" in " ".join(stderr.split())
    assert len(loaded) == 2
    assert (tmp_path / names[0]).stat().st_mtime_ns == first.st_mtime_ns

    assert cli.run([*words, "--seed", "3", "--resume"]) == 0  # nothing is left, and nothing is loaded
    assert capfd.readouterr().out.splitlines() == names and len(loaded) == 2
    report = tmp_path / "out" / "03-a-green-star-3.json"
    report.write_text(json.dumps(json.loads(report.read_text()) | {"recipe": "another model's"}))
    assert cli.run([*words, "--seed", "3", "--resume"]) == 2  # it is no longer what would be made
    assert "line 5: out: 'out/03-a-green-star-3.mp4' exists" in capfd.readouterr().err
    assert len(loaded) == 2
