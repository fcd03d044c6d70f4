"""A local Ray that cannot be started, and what watches one that runs; no cluster is started here."""

from __future__ import annotations

import os
import queue
import threading
from contextlib import closing
from pathlib import Path

import pytest

from launch import cli
from launch.cluster.cluster import Guard
from launch.serve.entries import State
from launch.serve.queue import Queue
from tests.forked import completed
from tests.jobs import PROMPT, TINY, make_job


def test_a_ray_that_cannot_be_started_is_said_once(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    small = ["--size", "64x48", "--frames", "5", "--steps", "4", "--ranks", "1", "--launcher", "ray"]
    ended = completed(
        ["generate", PROMPT, *small, "--out", str(tmp_path / "a.mp4")],
        env={**os.environ, "RAY_ADDRESS": "", "RAY_TMPDIR": str(file)},
        timeout=120,
    )
    assert (ended.returncode, ended.stdout) == (3, ""), ended.stderr
    assert ended.stderr.count("Ray could not be started on this machine: ") == 1, ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_queue_whose_ray_is_gone_waits_and_says_how_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was running is not called running when nobody is at it."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("RAY_ADDRESS", "")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "file"))
    with closing(Queue(tmp_path / "queue")) as opened:
        opened.submit(make_job(tmp_path / "a.mp4", **TINY))
        opened.take(0)
        assert cli.run(["queue", "run", "--queue", str(tmp_path / "queue")]) == 3
        assert opened.entry(1).state is State.WAITING
    said = capsys.readouterr().err
    assert "Ray could not be started on this machine: " in said
    assert "lockstep: the same command serves the requests that have not ended" in said


class Blind(Guard):
    """Cannot look at processes."""

    def _look(self) -> None:
        raise RuntimeError("no processes today")


def test_the_end_of_the_guard_is_told() -> None:
    told: queue.SimpleQueue[str] = queue.SimpleQueue()
    guard = Blind(told.put)
    assert "cannot be watched: RuntimeError: no processes today" in told.get(timeout=60)
    guard.end()


class Bereft(Guard):
    """Finds that a process of Ray has died."""

    def _watch(self) -> None:
        """Leave it to who asks."""

    def _look(self) -> None:
        self._lost("Ray's raylet died")


def test_nothing_is_made_of_a_failure_where_ray_is_what_failed() -> None:
    """Who asks is not answered any more, as the driver is ended."""
    told: queue.SimpleQueue[str] = queue.SimpleQueue()
    guard = Bereft(told.put)
    asked = threading.Thread(target=guard.look_again)
    asked.start()
    assert [told.get(timeout=60) for _ in range(3)] == ["Ray's raylet died"] * 3
    asked.join(1)
    assert asked.is_alive()
    guard.end()
    asked.join(60)
