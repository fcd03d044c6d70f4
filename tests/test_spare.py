"""A program that a spare process becomes finds what a new process finds, and ends as one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests import spare
from tests.spare import SparePopen
from tests.test_forked import ENDS, FOUND

Filled = Callable[[], None]


@pytest.fixture(params=["of the fork server", "of this process"])
def fill(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Filled]:
    if request.param == "of this process":
        monkeypatch.setattr(spare, "_server", 0)
    yield lambda: spare.fill(1)
    spare.dismiss()


def started(words: list[str], kind: type, **options: object) -> tuple[int, str, str]:
    pipe = subprocess.PIPE
    process = kind([sys.executable, *words], stdout=pipe, stderr=pipe, text=True, **options)
    said, complained = process.communicate(timeout=60)
    return process.returncode, said, complained


@pytest.mark.parametrize("named", [True, False])
def test_it_finds_what_a_new_process_finds(named: bool, fill: Filled, tmp_path: Path) -> None:
    (tmp_path / "found.py").write_text(FOUND)
    words = [*(["-m", "found"] if named else [str(tmp_path / "found.py")]), "one", "caf\udce9", ""]
    options = {"cwd": tmp_path, "env": {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", "A": "b"}}
    with Path("/dev/null").open() as nothing:
        theirs = started(words, subprocess.Popen, stdin=nothing, **options)
        fill()
        ours = started(words, SparePopen, stdin=nothing, **options)
    assert theirs[0] == ours[0] == 0, ours[2]
    assert json.loads(ours[1]) == json.loads(theirs[1])
    assert ours[2] == theirs[2] == "said\n"


@pytest.mark.parametrize("end", ENDS)
def test_it_ends_as_a_new_process_ends(end: str, fill: Filled, tmp_path: Path) -> None:
    (tmp_path / "ends.py").write_text(f"import atexit, os, signal, sys, threading\n{end}\n")
    fill()
    code, said, complained = started(["-m", "ends"], SparePopen, cwd=tmp_path)
    assert code == ENDS[end]
    assert said == ("at exit\n" if "at exit" in end else "") or "thread" in end
    assert bool(complained) is (code == 1)


def test_it_has_its_session_and_is_sent_signals(fill: Filled, tmp_path: Path) -> None:
    (tmp_path / "waits.py").write_text("import time\nprint('here', flush=True)\ntime.sleep(600)\n")
    fill()
    words, pipe = [sys.executable, "-m", "waits"], subprocess.PIPE
    with SparePopen(words, cwd=tmp_path, stdout=pipe, start_new_session=True) as process:
        assert process.stdout is not None and process.stdout.readline() == b"here\n"
        assert os.getsid(process.pid) == process.pid and process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.01)
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(60) == -signal.SIGTERM


def test_one_that_is_not_needed_ends(fill: Filled) -> None:
    fill()
    [waiting] = [psutil.Process(one.pid) for one in spare._spares]
    spare.dismiss()
    assert not waiting.is_running() or waiting.status() == psutil.STATUS_ZOMBIE


def test_another_program_is_started_as_ever(fill: Filled) -> None:
    fill()
    assert SparePopen(["sh", "-c", "exit 7"]).wait(60) == 7
    assert len(spare._spares) == 1
