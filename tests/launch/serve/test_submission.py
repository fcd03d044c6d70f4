"""Requests that a program submits to a queue, and waits for."""

from __future__ import annotations

import json
import threading
from contextlib import closing
from pathlib import Path

import pytest

from launch import cli, submit
from launch.serve.entries import Progress, ReplicaEntry, State
from launch.serve.queue import Queue
from runtime.engine import Engine
from runtime.errors import BadRequestError, CancelledError, JobFailedError
from runtime.jobs.run import run_job

SMALL = {"width": 32, "height": 32, "frames": 5, "steps": 2, "spectrum": "off"}


def test_a_request_is_waited_for(engine: Engine, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, out = tmp_path / "films", tmp_path / "a.mp4"
    request = submit("a red circle", out=out, queue=folder, owner="ann", priority=3, seed=5, **SMALL)
    assert (request.number, request.state, request.progress) == (1, "waiting", 0.0)
    assert (request.entry.owner, request.entry.priority) == ("ann", 3)
    with pytest.raises(TimeoutError, match=r"waiting after 0\.01 s; no replica serves the queue"):
        request.wait(0.01)
    assert "lockstep queue run --queue" in caplog.text

    with closing(Queue(folder)) as queue:  # as a replica does
        entry = queue.take(0)
        assert entry is not None
        queue.show_replica(ReplicaEntry(0, "running", [], 0))
        queue.report(entry.id, Progress(label="off", step=1, steps=2))
        assert (request.state, request.progress) == ("running", 0.5)
        made = run_job(engine, entry.job)
        threading.Timer(0.2, queue.end, (entry.id, State.DONE)).start()
        report = request.wait(60)
    assert report.to_json() == made.to_json() and report.request["seed"] == 5
    assert report.videos == [str(out)] and out.is_file() and request.progress == 1.0
    out.with_suffix(".json").unlink()
    with pytest.raises(JobFailedError, match="is not a report"):
        request.wait()


def test_one_that_ends_otherwise_is_an_error(tmp_path: Path) -> None:
    one, two = (submit("a", out=tmp_path / f"{name}.mp4", queue=tmp_path, **SMALL) for name in "ab")
    one.cancel()
    with pytest.raises(CancelledError, match="request-1 was cancelled: cancelled while it waited"):
        one.wait()
    with closing(Queue(tmp_path)) as queue:
        queue.take(0)
        queue.end(two.number, State.FAILED, "rank 0 was lost")
    with pytest.raises(JobFailedError, match="request-2 failed: rank 0 was lost"):
        two.wait()


def test_it_is_what_the_command_adds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    submit("a red circle", out="a.mp4", queue="one", ranks=2, seed=3)
    words = ["a red circle", "--out", "a.mp4", "--queue", "two", "--ranks", "2", "--seed", "3"]
    assert cli.run(["queue", "add", *words]) == 0
    jobs = []
    for name in ("one", "two"):
        with closing(Queue(tmp_path / name)) as queue:
            jobs.append(json.loads(queue.entry(1).text))
    assert jobs[0] == jobs[1]
    with pytest.raises(BadRequestError, match=r"a\.mp4' given; request-1 will write it"):
        submit("another", out="a.mp4", queue="one")
    with pytest.raises(BadRequestError, match="framse"):
        submit("another", out="b.mp4", queue="three", framse=5)
    assert not Path("three").exists()
