"""The pool beside a server: started when nobody serves the queue, and again when it ends."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from launch.http.pool import PoolKeeper
from launch.serve.entries import ReplicaEntry, State
from launch.serve.queue import Queue
from launch.shell.tied import tied
from tests.jobs import make_job
from tests.places import ROOT


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[Queue]:
    with closing(Queue(tmp_path / "queue")) as opened:
        yield opened


def wait(until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not until():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_queue_that_another_process_serves_is_left_to_it(queue: Queue) -> None:
    with closing(Queue(queue.folder)) as theirs, theirs.served():
        theirs.submit(make_job(Path("/nowhere/a.mp4")))
        theirs.take(0)
        keeper = PoolKeeper(queue, 1, 1)
        keeper.start()
        wait(lambda: keeper.problem().startswith("no replicas yet"))
        theirs.show_replica(ReplicaEntry(0, "working", [], 0))
        wait(lambda: keeper.problem() == "")
        assert theirs.entry(1).state is State.RUNNING
        theirs.show_replica(ReplicaEntry(0, "gone", [], 0))
        assert keeper.problem() == "all replicas are gone"
        keeper.stop()


def test_a_pool_that_cannot_be_started_is_tried_again(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when no process or no memory is left for it."""
    monkeypatch.setattr("launch.http.pool.tied", lambda command: ["/nowhere/python"])
    keeper = PoolKeeper(queue, 1, 1)
    keeper.start()
    wait(lambda: keeper.problem().startswith("the pool cannot be started (No such file or directory)"))
    monkeypatch.setattr("launch.http.pool.tied", lambda command: [sys.executable, "-c", "exit(7)"])
    wait(lambda: keeper.problem().startswith("the pool ended with exit code 7"))
    keeper.stop()


def test_a_server_without_replicas_starts_none(queue: Queue) -> None:
    keeper = PoolKeeper(queue, 0, 1)
    keeper.start()
    wait(lambda: keeper.problem() == "nobody serves the queue")
    keeper.stop()


@pytest.mark.alone
def test_a_pool_that_ends_is_started_again_and_its_requests_wait(
    queue: Queue, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A cluster that is not there ends it at once."""
    caplog.set_level(logging.WARNING, "launch")
    queue.submit(make_job(Path("/nowhere/a.mp4")))
    queue.take(0)
    environment = os.environ | {"RAY_ADDRESS": "127.0.0.1:9", "PYTHONPATH": str(ROOT)}
    keeper = PoolKeeper(queue, 1, 1, environment)
    keeper.start()
    wait(lambda: caplog.text.count("the pool ended with exit code 2") > 1)
    assert "is started again within 2 s" in keeper.problem() or not keeper.problem()
    assert queue.entry(1).state is State.WAITING
    keeper.stop()


def test_what_is_tied_is_told_to_end_when_its_parent_is_killed(tmp_path: Path) -> None:
    told = tmp_path / "told"
    child = (
        "import pathlib, signal, sys\n"
        f"signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path({str(told)!r}).touch(), sys.exit()))\n"
        "print('ready', flush=True)\n"
        "while True: signal.pause()\n"
    )
    parent = (
        "import subprocess, sys\n"
        "from launch.shell.tied import tied\n"
        f"subprocess.run(tied([sys.executable, '-c', {child!r}]))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", parent], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        [tied_one] = psutil.Process(process.pid).children()
        process.send_signal(signal.SIGKILL)
    wait(told.exists)
    wait(lambda: not tied_one.is_running() or tied_one.status() == psutil.STATUS_ZOMBIE)
    command = tied(["true"])
    command[command.index(str(os.getpid()))] = "1"  # the parent is not the one that it was started for
    assert subprocess.run(command, env=environment, check=False).returncode == 0
