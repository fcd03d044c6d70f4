"""Ray's own processes die or stop, and so do those of the command; through the command, on a Ray of its own.

Whatever happens, the command ends with a code of the contract, the video is the same bits, and nothing of
what it has started is left.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.jobs import PROMPT

STEPS = 40
_SIZE = ["--size", "64x48", "--frames", "5", "--steps", str(STEPS), "--spectrum", "off"]

pytestmark = [pytest.mark.alone, pytest.mark.timeout(280)]


@contextmanager
def generating(out: Path) -> Iterator[tuple[subprocess.Popen[str], dict[str, psutil.Process]]]:
    """The command, two ranks of which have done some steps, and its family by what they are."""
    command = [sys.executable, "-m", "launch", "generate", PROMPT, "--ranks", "2", "--cfg", "2", *_SIZE]
    command += ["--out", str(out), "--checkpoint-every", "1", "--timeout", "5"]
    clean = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=clean
    ) as process:
        assert process.stderr is not None
        line = "begin"
        while line and f"step {STEPS // 10}/" not in line:
            line = process.stderr.readline()
        yield process, family(process)


def family(process: subprocess.Popen[str]) -> dict[str, psutil.Process]:
    members = psutil.Process(process.pid).children(recursive=True)
    keeper = next(member for member in members if member.ppid() == process.pid)
    driver = next(member for member in members if member.ppid() == keeper.pid)
    known = {"command": psutil.Process(process.pid), "keeper": keeper, "driver": driver}
    return {title(member): member for member in members} | known


def title(process: psutil.Process) -> str:
    """What a process of Ray calls itself; its number where it is any Python."""
    name = (process.cmdline() or [""])[0].rpartition("/")[2].strip()
    return f"{process.pid}" if name.startswith("python") else name


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Digests of the frames that one rank makes; two ranks of cfg make the same bits."""
    out = tmp_path_factory.mktemp("alone") / "a.mp4"
    subprocess.run([sys.executable, "-m", "launch", "generate", PROMPT, *_SIZE, "--out", out], check=True)
    return digests(out)


def digests(out: Path) -> list[str]:
    told: list[str] = json.loads(out.with_suffix(".json").read_text())["frames_sha256"]
    return told


def check_nothing_is_left(members: dict[str, psutil.Process]) -> None:
    left = psutil.wait_procs(list(members.values()), timeout=30)[1]
    assert all(process.status() == psutil.STATUS_ZOMBIE for process in left), left


@pytest.mark.parametrize(
    ("victim", "number", "reason"),
    [
        ("gcs_server", signal.SIGKILL, r"Ray's GCS server \(process \d+\) died; continuing with a new Ray"),
        *(
            pytest.param(victim, number, reason, marks=pytest.mark.slow)
            for victim, number, reason in [
                ("gcs_server", signal.SIGTERM, ""),  # it takes its time, and the job may be done by then
                ("gcs_server", signal.SIGSTOP, "Ray's GCS server .* was stopped; continuing with a new Ray"),
                ("raylet", signal.SIGKILL, "Ray's raylet .* died; continuing with a new Ray"),
                ("ray::DashboardAgent", signal.SIGKILL, "Ray's .* died; continuing with a new Ray"),
                ("ray::RuntimeEnvAgent", signal.SIGSTOP, ""),
                (
                    "driver",
                    signal.SIGKILL,
                    "the process that drives Ray was ended; continuing with a new Ray",
                ),
                ("driver", signal.SIGSTOP, "no heartbeat for 30 s; continuing with a new Ray"),
                (
                    "keeper",
                    signal.SIGKILL,
                    "the process that drives Ray was ended; continuing with a new Ray",
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
        members[victim].send_signal(number)
        told, said = command.communicate(timeout=240)
    assert (command.returncode, told) == (0, f"{out}\n"), said
    assert re.search(reason, said), said
    assert "Traceback" not in said
    assert digests(out) == undisturbed
    assert {path.name for path in tmp_path.iterdir()} == {"a.mp4", "a.json", "a.png"}
    check_nothing_is_left(members)


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_nothing_is_left_of_a_command_that_is_ended(number: signal.Signals, tmp_path: Path) -> None:
    with generating(tmp_path / "a.mp4") as (command, members):
        command.send_signal(number)
        _, said = command.communicate(timeout=60)
    assert command.returncode == (130 if number == signal.SIGINT else -number)
    assert number == signal.SIGKILL or "lockstep: cancelled (stopped after step" in said
    check_nothing_is_left(members)
    assert not (tmp_path / "a.mp4").exists()
    assert list(tmp_path.glob("**/manifest-*"))
