"""A process and all that it starts: whoever dies, nothing of it is left. In real processes, without Ray."""

from __future__ import annotations

import fcntl
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

_HOLDER = """
import ctypes, fcntl, platform, sys, threading, time

held = open(sys.argv[1], "w")
fcntl.flock(held, fcntl.LOCK_EX)
threading.Thread(target=time.sleep, args=(600,)).start()
print("held", flush=True)
ctypes.CDLL(None).syscall({"x86_64": 60, "aarch64": 93}[platform.machine()], 0)
"""
_ENDS_HOLDER = """
import subprocess, sys
from launch.shell.family import Family

def main():
    holder = subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[2]], stdout=subprocess.PIPE)
    holder.stdout.readline()

family = Family(main)
while not family.over:
    pass
family.end()
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


def test_a_process_whose_first_thread_has_ended_holds_its_locks_no_longer(tmp_path: Path) -> None:
    """It looks like a zombie, while its other threads and its files are there."""
    lock = tmp_path / "lock"
    subprocess.run([sys.executable, "-c", _ENDS_HOLDER, _HOLDER, str(lock)], check=True, timeout=60)
    with lock.open("w") as again:
        fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
