"""What a job's options stand for, and what can be done after it was interrupted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from launch.cluster.run import _made_since
from runtime.checkpoint.folder import Checkpoints
from runtime.checkpoint.manifests import VERSION, manifest_name
from runtime.engine import Engine
from runtime.errors import BadRequestError
from runtime.jobs.run import do_job, silent
from runtime.reports.report import Report
from tests.jobs import TINY, make_job


def test_a_retry_replaces_what_the_attempt_before_made_and_nothing_else(tmp_path: Path) -> None:
    job = make_job(tmp_path / "a.mp4")
    assert not job.retried().outputs.overwrite
    (tmp_path / "a.mp4").write_text("somebody else's")
    again = job.retried()
    with pytest.raises(BadRequestError, match="exists"):
        again.outputs.check(1)
    report = {"request": job.request.model_dump(mode="json"), "videos": [str(tmp_path / "a.mp4")]}
    (tmp_path / "a.json").write_text(json.dumps(report))  # it appears before the video
    assert job.retried().outputs.overwrite
    (tmp_path / "a.json").write_text(json.dumps(report | {"request": {"prompt": "another"}}))
    assert not job.retried().outputs.overwrite
    (tmp_path / "a.json").write_text("{}")
    assert not job.retried().outputs.overwrite


def test_a_job_whose_driver_is_lost_is_done_once_all_its_files_are_new(
    engine: Engine, tmp_path: Path
) -> None:
    job = make_job(tmp_path / "a.mp4", **TINY)
    before = job.outputs.state(1)
    assert _made_since(job, before) is None
    made = do_job(engine, job, silent)
    assert isinstance(made, Report)
    found = _made_since(job, before)
    assert found is not None and found.frames_sha256 == made.frames_sha256
    assert _made_since(job, job.outputs.state(1)) is None  # they are of an earlier run
    other = replace(job, request=job.request.model_copy(update={"seed": 8}))
    assert _made_since(other, before) is None
    (tmp_path / "a.mp4").unlink()  # the report is there first
    assert _made_since(job, before) is None


def test_advice_is_what_would_go_on_now(tmp_path: Path) -> None:
    job = make_job(tmp_path / "a.mp4")
    nothing = "there is no checkpoint: the same command starts again at the first step"
    assert job.advice() == nothing == make_job(tmp_path / "a.mp4", checkpoint_every=0).advice()
    other = make_job(tmp_path / "b.mp4")
    report = {"request": other.request.model_dump(mode="json"), "videos": [str(tmp_path / "b.mp4")]}
    (tmp_path / "b.json").write_text(json.dumps(report))  # its own
    assert "the same command with --overwrite starts again" in other.advice()
    folder = tmp_path / "a.checkpoints" / "0123456789abcdef"
    folder.mkdir(parents=True)
    topology = {"cfg": 1, "ring": 1, "ulysses": 2}
    manifest = {"version": VERSION, "step": 7, "topology": topology}
    (folder / manifest_name(7, 0)).write_text(json.dumps(manifest))
    resume = "there is no complete checkpoint: the same command with --resume starts again at the first step"
    assert job.advice() == resume  # the second rank's is missing
    first_step = r"--resume \(in Python: resume=True\) starts at the first step \(none of them is complete\)"
    with pytest.raises(BadRequestError, match=first_step):
        job.check_files()
    make_job(tmp_path / "a.mp4", resume=True).check_files()
    (folder / manifest_name(7, 1)).write_text(json.dumps(manifest))
    resumes = "resumes from the last checkpoint"
    assert job.advice() == f"the same command with --resume {resumes}"
    assert make_job(tmp_path / "a.mp4", resume=True).advice() == f"the same command {resumes}"
    (tmp_path / "a.mp4").touch()
    first = f"move {str(tmp_path / 'a.mp4')!r} elsewhere; then the same command"  # it is not the job's
    assert job.advice() == f"{first} with --resume {resumes}"
    assert make_job(tmp_path / "a.mp4", resume=True, overwrite=True).advice() == f"the same command {resumes}"
    (tmp_path / "a.mp4").unlink()
    (tmp_path / "a.mp4").mkdir()  # which is never replaced
    assert make_job(tmp_path / "a.mp4", resume=True, overwrite=True).advice() == f"{first} {resumes}"
    (tmp_path / "a.mp4").rmdir()
    (tmp_path / "a.json").touch()
    assert job.advice().startswith(f"move {str(tmp_path / 'a.json')!r} elsewhere; then ")
    (tmp_path / "a.json").unlink()
    (tmp_path / "a.mp4").touch()
    (tmp_path / "a.mp4").unlink()
    report = {"request": job.request.model_dump(mode="json"), "videos": [str(tmp_path / "a.mp4")]}
    report["decision_digest"] = []
    (tmp_path / "a.json").write_text(json.dumps(report))  # killed before the video had its name
    assert job.advice() == f"the same command with --resume {resumes}"
    make_job(tmp_path / "a.mp4", resume=True).check_files()
    for path in folder.iterdir():
        path.unlink()
    with pytest.raises(BadRequestError, match="exists"):  # a video that is done is not made again unasked
        make_job(tmp_path / "a.mp4", resume=True).check_files()


def test_checkpoints_of_jobs_in_one_folder_are_apart(tmp_path: Path) -> None:
    roots = []
    for name in ("one/a.mp4", "two/a.mp4"):
        job = make_job(tmp_path / name, checkpoints=tmp_path / "all")
        job.check_files()
        assert job.checkpoints is not None
        roots.append(job.checkpoints.root)
        (roots[-1] / "0123456789abcdef").mkdir(parents=True)
        (roots[-1] / "0123456789abcdef" / manifest_name(1, 0)).touch()
    assert roots[0] != roots[1]
    with pytest.raises(BadRequestError, match="holds checkpoints of an unfinished job"):
        make_job(tmp_path / "two" / "a.mp4", checkpoints=tmp_path / "all").check_files()
    Checkpoints(roots[1], every=1).remove()
    assert [path.name for path in (tmp_path / "all").iterdir()] == [roots[0].name]


@pytest.mark.parametrize("option", ["out", "report", "checkpoints"])
def test_no_path_that_is_deleted_with_a_ray_job_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    packed = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    packed.mkdir(parents=True)
    monkeypatch.chdir(packed)
    names = {"out": "a.mp4", "report": "a.json", "checkpoints": "kept"}
    given = {name: tmp_path / value for name, value in names.items()} | {option: Path(names[option])}
    with pytest.raises(BadRequestError, match=f"{option}: '{names[option]}.* give an absolute path"):
        make_job(given.pop("out"), **given).check_files()
    assert list(packed.iterdir()) == []


def test_long_work_is_bounded_by_the_config_or_what_is_said_instead(tmp_path: Path) -> None:
    assert make_job(tmp_path / "a.mp4").config.busy_timeout == 1800.0
    assert make_job(tmp_path / "a.mp4", busy_timeout=60.0).config.busy_timeout == 60.0
