"""Ray's own processes die or stop, and so do those of the command; through the command, on a Ray of its own.

Whatever happens, the command ends with a code of the contract, the video is the same bits, and nothing of
what it has started is left.
"""

from __future__ import annotations

import re
import signal
import subprocess
import time
from contextlib import closing, suppress
from pathlib import Path

import psutil
import pytest

from launch.serve.entries import State
from launch.serve.queue import Queue
from tests.commands import STEPS, check_nothing_is_left, digests, environment, family, generating, made_alone
from tests.forked import Command
from tests.jobs import TINY, make_job

pytestmark = [pytest.mark.alone, pytest.mark.timeout(280)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return made_alone(tmp_path_factory.mktemp("alone") / "a.mp4")


@pytest.mark.parametrize(
    ("victim", "number", "reason"),
    [
        ("gcs_server", signal.SIGKILL, r"Ray's GCS server \(process \d+\) died; continuing with a new Ray"),
        *(
            pytest.param(victim, number, reason, marks=pytest.mark.slow)
            for victim, number, reason in [
                ("gcs_server", signal.SIGTERM, ""),  # it takes its time, and the job may be done by then
                ("gcs_server", signal.SIGSTOP, f"stopped; continuing with a new Ray|step {STEPS}/{STEPS}"),
                ("raylet", signal.SIGKILL, "Ray's raylet .* died; continuing with a new Ray"),
                ("ray::DashboardAgent", signal.SIGKILL, "Ray's .* died; continuing with a new Ray"),
                ("ray::RuntimeEnvAgent", signal.SIGSTOP, ""),
                (
                    "driver",
                    signal.SIGKILL,
                    "the Ray driver process ended unexpectedly; continuing with a new Ray",
                ),
                (
                    "driver",
                    signal.SIGSTOP,
                    "no heartbeat for 30 s(; continuing with|, but its work was done)",
                ),
                (
                    "keeper",
                    signal.SIGKILL,
                    "the Ray driver process ended unexpectedly; continuing with a new Ray",
                ),
                ("keeper", signal.SIGSTOP, ""),
            ]
        ),
    ],
)
def test_the_job_goes_on_whoever_dies(
    victim: str, number: signal.Signals, reason: str, tmp_path: Path, undisturbed: list[str]
) -> None:
    out = tmp_path / "a.mp4"
    with generating(out) as (command, members):
        priorities = {one.nice() for name, one in members.items() if "RankActor" in name or name == "command"}
        members[victim].send_signal(number)
        told, said = command.communicate(timeout=240)
    assert len(priorities) == 1, "ranks wait for what else the machine does"
    assert (command.returncode, told) == (0, f"{out}\n"), said
    assert re.search(reason, said), said
    assert "Traceback" not in said
    assert digests(out) == undisturbed
    assert {path.name for path in tmp_path.iterdir()} == {"a.mp4", "a.json", "a.png"}
    check_nothing_is_left(members)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("last", "victim", "number"),
    [
        ("step", "driver", signal.SIGKILL),
        ("step", "keeper", signal.SIGKILL),
        ("step", "gcs_server", signal.SIGSTOP),
        ("file", "driver", signal.SIGKILL),
        ("file", "driver", signal.SIGSTOP),
        ("file", "keeper", signal.SIGSTOP),
        ("file", "gcs_server", signal.SIGSTOP),
        ("file", "raylet", signal.SIGKILL),
    ],
)
def test_whoever_dies_when_the_job_is_all_but_done_it_is_done(
    last: str, victim: str, number: signal.Signals, tmp_path: Path, undisturbed: list[str]
) -> None:
    """After the last step; or when the video is there, and its driver has perhaps not said so."""
    out = tmp_path / "a.mp4"
    with generating(out, step=STEPS) as (command, members):
        while last == "file" and not out.exists():
            assert command.poll() is None
        with suppress(psutil.NoSuchProcess):  # it may have ended by then
            members[victim].send_signal(number)
        told, said = command.communicate(timeout=240)
    assert (command.returncode, told) == (0, f"{out}\n"), said
    assert "Traceback" not in said
    assert digests(out) == undisturbed
    assert {path.name for path in tmp_path.iterdir()} == {"a.mp4", "a.json", "a.png"}
    check_nothing_is_left(members)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "number"),
    [("gcs_server", signal.SIGSTOP), ("driver", signal.SIGKILL), ("keeper", signal.SIGSTOP)],
)
def test_a_queue_whose_last_request_is_done_is_served(
    victim: str, number: signal.Signals, tmp_path: Path
) -> None:
    with closing(Queue(tmp_path / "queue")) as queue:
        for name in ("a", "b"):
            queue.submit(make_job(tmp_path / f"{name}.mp4", **TINY).absolute(), name=name)
        words, pipe = ["queue", "run", "--queue", str(queue.folder)], subprocess.PIPE
        with Command(words, stdout=pipe, stderr=pipe, env=environment()) as pool:
            while queue.count()[State.DONE] < 1:
                assert pool.poll() is None
                time.sleep(0.02)
            members = family(pool)
            while queue.count()[State.DONE] < 2:
                time.sleep(0.005)
            with suppress(psutil.NoSuchProcess):
                members[victim].send_signal(number)
            told, said = pool.communicate(timeout=240)
        assert (pool.returncode, told) == (0, ""), said
        assert "2 done, 0 failed, 0 cancelled" in said and "Traceback" not in said
        assert queue.replicas() == []
    assert not list(tmp_path.glob("*.checkpoints"))
    check_nothing_is_left(members)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_nothing_is_left_of_a_command_that_is_ended(number: signal.Signals, tmp_path: Path) -> None:
    with generating(tmp_path / "a.mp4") as (command, members):
        command.send_signal(number)
        _, said = command.communicate(timeout=60)
    assert command.returncode == (130 if number == signal.SIGINT else -number)
    assert number == signal.SIGKILL or "lockstep: cancelled (stopped after step" in said
    check_nothing_is_left(members)
    assert not (tmp_path / "a.mp4").exists()
    assert list(tmp_path.glob("**/manifest-*"))
