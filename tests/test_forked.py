"""A command that is forked finds what a new process finds, and ends as one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.forked import Command, completed

FOUND = """
import json, multiprocessing, os, signal, sys, threading
print(json.dumps([
    sys.argv, os.getcwd(), dict(os.environ), __name__, sys.path[0], sys.stdin.read(),
    {number: str(signal.getsignal(number)) for number in signal.valid_signals()},
    sorted(map(int, os.listdir("/proc/self/fd")))[:-1], threading.active_count(), os.getppid() == os.getpid(),
    multiprocessing.current_process().daemon, multiprocessing.parent_process() is None,
]))
print("said", file=sys.stderr)
"""
ENDS = {
    "sys.exit(3)": 3,
    "sys.exit()": 0,
    "sys.exit('no')": 1,
    "pass": 0,
    "1 / 0": 1,
    "os.kill(os.getpid(), signal.SIGKILL)": -9,
    "os.kill(os.getpid(), signal.SIGTERM)": -15,
    "atexit.register(print, 'at exit'); threading.Timer(0.1, print, ['a thread']).start()": 0,
}


def new(words: list[str], module: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload, no-any-return]


def test_it_finds_what_a_new_process_finds(tmp_path: Path) -> None:
    (tmp_path / "found.py").write_text(FOUND)
    words, environment = ["one", "caf\udce9", ""], {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", "A": "b"}
    with Path("/dev/null").open() as nothing:
        given = {"stdin": nothing, "cwd": tmp_path, "env": environment}
        ours, theirs = completed(words, "found", **given), new(words, "found", **given)
    assert theirs.returncode == ours.returncode == 0, ours.stderr
    assert json.loads(ours.stdout) == json.loads(theirs.stdout)
    assert ours.stderr == theirs.stderr == "said\n"


@pytest.mark.parametrize("end", ENDS)
def test_it_ends_as_a_new_process_ends(end: str, tmp_path: Path) -> None:
    (tmp_path / "ends.py").write_text(f"import atexit, os, signal, sys, threading\n{end}\n")
    ours, theirs = completed([], "ends", cwd=tmp_path), new([], "ends", cwd=tmp_path)
    assert ours.returncode == theirs.returncode == ENDS[end]
    assert ours.stdout == theirs.stdout
    assert ours.stderr.splitlines()[-1:] == theirs.stderr.splitlines()[-1:]


def test_it_is_sent_signals_and_waited_for(tmp_path: Path) -> None:
    (tmp_path / "waits.py").write_text("import time\nprint('here', flush=True)\ntime.sleep(600)\n")
    with Command([], "waits", cwd=tmp_path, stdout=subprocess.PIPE) as command:
        assert command.stdout is not None and command.stdout.readline() == "here\n"
        with pytest.raises(subprocess.TimeoutExpired):
            command.wait(0.01)
        command.send_signal(signal.SIGTERM)
        assert command.wait(60) == -signal.SIGTERM
