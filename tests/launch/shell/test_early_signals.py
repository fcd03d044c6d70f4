"""Signals that come while a command still imports its libraries, or cleans up, find it in order, too."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from runtime.parallel.signals import ending_signals


def listens(pid: int) -> bool:
    """Whether the process has a handler for SIGHUP: the last of the first things that the command does."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught, 16) >> (signal.SIGHUP - 1) & 1)


def imports_torch(pid: int) -> bool:
    """Whether it is about to import torch, which takes a second or more from here on."""
    return "libtorch_cpu" in Path(f"/proc/{pid}/maps").read_text()


@pytest.mark.parametrize(
    ("when", "number"),
    [
        (listens, signal.SIGINT),
        (listens, signal.SIGTERM),
        (listens, signal.SIGHUP),
        (imports_torch, signal.SIGINT),
    ],
)
def test_a_command_that_still_imports_is_cancelled(
    when: Callable[[int], bool], number: signal.Signals, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "launch", "generate", "a", "--size", "64x48", "--frames", "5"]
    with subprocess.Popen(
        [*command, "--out", str(tmp_path / "a.mp4")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            while not when(process.pid):
                assert process.poll() is None
                time.sleep(0.002)
            process.send_signal(number)
            printed, said = process.communicate(timeout=120)
        finally:
            process.kill()
    assert (process.returncode, printed, said.strip()) == (130, "", "lockstep: cancelled")
    assert not list(tmp_path.iterdir())


def test_what_nohup_has_ignored_ends_nothing() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert ending_signals() == (signal.SIGINT, signal.SIGTERM)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert signal.SIGHUP in ending_signals()


def test_a_signal_while_a_command_cleans_up_changes_nothing() -> None:
    code = """
import atexit, os, signal
from launch.shell.exits import end_with, interrupt
signal.signal(signal.SIGINT, interrupt)
def run(arguments):
    atexit.register(print, "cleaned up", flush=True)
    atexit.register(os.kill, os.getpid(), signal.SIGINT)
    return 0
end_with(run)
"""
    ended = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=120
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "cleaned up\n", "")


def test_a_signal_that_is_sent_twice_interrupts_once() -> None:
    """By a terminal and by an agent, for example: the second comes while the command says why it ends."""
    code = """
import os, signal, sys
import click
from launch.shell.exits import end_with, interrupt, run_command
signal.signal(signal.SIGINT, interrupt)
signal.signal(signal.SIGTERM, interrupt)

@click.command()
def waits():
    try:
        os.kill(os.getpid(), signal.SIGINT)
    finally:
        os.kill(os.getpid(), signal.SIGTERM)
        print("left in order", flush=True)

end_with(lambda arguments: run_command(waits, arguments, "waits"))
"""
    ended = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=120
    )
    assert (ended.returncode, ended.stdout, ended.stderr.strip()) == (
        130,
        "left in order\n",
        "lockstep: cancelled",
    )
