"""A process and all that it starts: whoever dies, nothing of it is left. In real processes, without Ray."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

_COMMAND = """
import os, signal, subprocess, sys, time
from pathlib import Path
from launch.shell.family import Family

folder = Path(sys.argv[1])

def main():
    kept = subprocess.Popen(["sleep", "600"])
    strange = subprocess.Popen(["sh", "-c", "sleep 600 & exec setsid sleep 600"])
    os.kill(kept.pid, signal.SIGSTOP)
    time.sleep(0.2)  # for the shell to have started both
    (folder / "main.part").write_text(f"{os.getppid()} {os.getpid()} {kept.pid}")
    (folder / "main.part").rename(folder / "main")
    if sys.argv[2] == "stays":
        time.sleep(600)

family = Family(main)
while not (family.over or (folder / "end").exists()):
    time.sleep(0.01)
family.end()
print("ended", flush=True)
"""


def start(folder: Path, what: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _COMMAND, str(folder), what]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def members(command: subprocess.Popen[str], folder: Path) -> list[psutil.Process]:
    """Everything that it has started, once it is there."""
    while not (folder / "main").exists():
        assert command.poll() is None
        time.sleep(0.01)
    return psutil.Process(command.pid).children(recursive=True)


def gone(processes: list[psutil.Process]) -> bool:
    left = psutil.wait_procs(processes, timeout=30)[1]
    return all(process.status() == psutil.STATUS_ZOMBIE for process in left)


def test_what_main_leaves_behind_ends_with_it(tmp_path: Path) -> None:
    with start(tmp_path, "leaves") as command:
        while not (tmp_path / "main").exists():
            assert command.poll() is None
            time.sleep(0.01)
        sleeps = psutil.Process(int((tmp_path / "main").read_text().split()[2]))
        assert command.wait(30) == 0
    assert gone([sleeps])


@pytest.mark.parametrize("victim", ["command", "keeper", "main", "nobody"])
def test_whoever_is_killed_nothing_is_left(victim: str, tmp_path: Path) -> None:
    """A child that has stopped, one in a session of its own, and one whose parent is gone."""
    with start(tmp_path, "stays") as command:
        family = members(command, tmp_path)
        assert len([process for process in family if process.name() == "sleep"]) == 3
        keeper, main, _ = map(int, (tmp_path / "main").read_text().split())
        if victim == "nobody":
            (tmp_path / "end").touch()
        else:
            os.kill({"command": command.pid, "keeper": keeper, "main": main}[victim], signal.SIGKILL)
        assert command.wait(30) == (-signal.SIGKILL if victim == "command" else 0)
    if victim == "keeper":  # who has left the session, too, and has lost its keeper is beyond reach
        stranger = next(
            process for process in family if process.is_running() and lives_apart(process, keeper)
        )
        family.remove(stranger)
        stranger.kill()
    assert gone(family)


def lives_apart(process: psutil.Process, session: int) -> bool:
    try:
        return os.getsid(process.pid) != session and process.status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False
