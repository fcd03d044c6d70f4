"""A preset is decided at the door: its files are read once, and what becomes of them changes no job."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from launch import cli
from runtime.engine import Engine
from runtime.errors import BadRequestError
from runtime.jobs.job import Job
from runtime.jobs.run import run_job
from runtime.request.config import shipped
from tests.jobs import PROMPT, TINY, make_job

COMPUTED = [0, 1, 4, 9]
STEPS = 10
_counting: list[Counter[Path]] = []


def _count(event: str, arguments: tuple[Any, ...]) -> None:
    if _counting and event == "open" and isinstance(arguments[0], str | Path):
        _counting[-1][Path(arguments[0]).absolute()] += 1


sys.addaudithook(_count)


@contextmanager
def opened() -> Iterator[Counter[Path]]:
    """How often each file was opened by this process in the block."""
    _counting.append(Counter())
    try:
        yield _counting[-1]
    finally:
        _counting.pop()


@pytest.fixture
def preset(tmp_path: Path) -> Path:
    """A preset of one's own, with a calibration of one's own beside it, for small videos."""
    calibration = json.loads(shipped("calibrations", "wan-tiny.json").read_text(encoding="utf-8"))
    calibration["conditions"] |= {name: TINY[name] for name in ("width", "height", "frames")}
    (tmp_path / "own.json").write_text(json.dumps(calibration), encoding="utf-8")
    path = tmp_path / "own.yaml"
    path.write_text(
        "stream: guided\nschedule: {kind: planned, nfe: 4, guard: null}\n"
        "predictor: {kind: calibrated}\ncalibration: own.json\n"
    )
    return path


@pytest.mark.parametrize("more", [[], ["--compare", "--checkpoint-every", "1"]], ids=["", "compared"])
def test_a_preset_is_read_once_from_the_door_to_the_last_frame(
    preset: Path, tmp_path: Path, more: list[str]
) -> None:
    out = tmp_path / "a.mp4"
    small = ["--size", "64x48", "--frames", "5", "--max-sequence-length", "32"]
    with opened() as files:
        assert cli.run(["generate", PROMPT, *small, "--spectrum", str(preset), "--out", str(out), *more]) == 0
    assert json.loads(out.with_suffix(".json").read_text())["nfe"]["cond"] == 4
    assert files[preset] == files[preset.with_suffix(".json")] == 1
    assert files[shipped("spectrum", "off.yaml")] == bool(more)
    assert files[shipped("wan-tiny.yaml")] == 1


def explicit(path: Path, computed: list[int]) -> str:
    path.write_text(f"schedule: {{kind: explicit, computed: {computed}}}\n")
    return str(path)


@pytest.mark.parametrize("after", ["another", "broken", "gone"])
def test_a_preset_that_changes_after_the_door_changes_no_job(
    engine: Engine, tmp_path: Path, after: str
) -> None:
    path = tmp_path / "own.yaml"
    options = TINY | {"steps": STEPS, "spectrum": explicit(path, COMPUTED)}
    queued = make_job(tmp_path / "a.mp4", **options).planned().to_json()
    if after == "gone":
        path.unlink()
    elif after == "broken":
        path.write_text("schedule: [")
    else:
        explicit(path, [0, 5])
    report = run_job(engine, Job.from_json(queued))
    assert report.computed.cond == COMPUTED
    assert report.spectrum["schedule"]["computed"] == COMPUTED


def test_a_calibration_that_changes_after_the_door_is_refused(
    engine: Engine, preset: Path, tmp_path: Path
) -> None:
    job = make_job(tmp_path / "a.mp4", **TINY | {"steps": 50, "spectrum": str(preset)}).planned()
    calibration = preset.with_suffix(".json")
    content = json.loads(calibration.read_text())
    content["sensitivity"][3] *= 2
    calibration.write_text(json.dumps(content))
    with pytest.raises(BadRequestError, match=r"since it was planned: preset\.calibration was '.*now it"):
        run_job(engine, Job.from_json(job.to_json()))
    assert not job.outputs.video.exists()
    assert job.preset.calibrated is not None  # what this process has read, it keeps
    assert run_job(engine, job).nfe.cond == 4
