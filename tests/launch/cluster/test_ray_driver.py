"""A driver in a process of its own: what becomes of it when Ray does its worst. Without Ray, in moments."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

_COMMAND = """
import os, signal, subprocess, sys, threading, time
from pathlib import Path
from rich.console import Console
from launch.cluster import driver as ray_driver
from launch.shell import family
from launch.shell.exits import explain
from launch.shell.logs import set_up_logging
from runtime.errors import BadRequestError, CancelledError, RankFailedError

what, tries = sys.argv[1], Path(sys.argv[2])
made = tries.with_name("made")
if what == "stops":
    ray_driver._SILENCE = 5.0  # five signs of life, so that a busy machine is no silence
if what == "deaf":
    ray_driver._DEAF = 0.5
if what == "dies now and then":
    ray_driver._MEMORY = 0.0
if "end" in what.split():
    ray_driver._LEAVING = family._PATIENCE = 0.5

def hit(moment):
    if what.startswith(moment):
        victim = os.getpid() if "driver" in what else os.getppid()
        os.kill(victim, signal.SIGKILL if "killed" in what else signal.SIGSTOP)
        time.sleep(60 * ("killed" in what))  # a keeper takes its driver with it

def work(driver):
    with tries.open("a") as file:
        file.write(f"{driver.again} ")
    print("from Ray")
    if what == "refuses":
        raise BadRequestError("ranks: 9 given")
    if what == "fails":
        raise RankFailedError(1, "step 3", "it died")
    if what == "strange":
        class Strange(Exception):
            pass
        raise Strange("one of a kind")
    if what == "exits":
        sys.exit(1)
    if what == "dies" or what == "dies once" and not driver.again:
        os.kill(os.getpid(), signal.SIGABRT)
    if what == "dies now and then" and len(tries.read_text().split()) < 5:
        os.kill(os.getpid(), signal.SIGABRT)
    if what == "stops" and not driver.again:
        os.kill(os.getpid(), signal.SIGSTOP)
    if what == "stuck" and not driver.again:
        with driver.pulse.within(0.1, "ray.wait"):
            time.sleep(600)
    if what == "lost" and not driver.again:
        driver.lost("Ray's raylet died")
        time.sleep(600)
    if what == "deaf":
        print("deaf", file=sys.stderr, flush=True)
        time.sleep(600)
    if what == "hears":
        heard = []
        def stop():
            heard.append(True)
            return True
        with driver.stopped_by_signals(stop):
            print("hears", file=sys.stderr, flush=True)
            while not heard:
                time.sleep(0.01)
        raise CancelledError("stopped after step 3")
    if what == "has ended":
        answered, tell = threading.Event(), driver._tell
        def tell_and_note(message):
            tell(message)
            if isinstance(message, ray_driver.Heard):
                answered.set()
        driver._tell = tell_and_note
        with driver.stopped_by_signals(lambda: True):
            pass
        print("has ended", file=sys.stderr, flush=True)
        answered.wait(30)
    if "end" in what.split():
        started = subprocess.Popen(["sleep", "600"])
        with (tries.parent / "started").open("a") as file:
            file.write(f"{started.pid} ")
    if what == "leaves its work done":
        made.write_text("made without it")
        os.kill(os.getpid(), signal.SIGKILL)
    if not driver.again:
        hit("before the end")
    driver.done("the result")
    hit("at the end")
    if what == "does not leave" or "end" in what.split():
        time.sleep(600)

console = Console(stderr=True)
set_up_logging(console, verbose=False)
if what == "does not leave":
    ray_driver._LEAVING = 0.1
try:
    print(ray_driver.drive(
        work, console, own=sys.argv[3] == "own", made=lambda: made.read_text() if made.exists() else None
    ))
except Exception as error:
    sys.exit(explain(error))
"""


def drive(
    what: str, folder: Path, *, own: bool = True, number: signal.Signals | None = None
) -> tuple[int, str, str, list[str]]:
    """Exit code, what was said on both streams, and what each driver was told of those before."""
    arguments = [what, str(folder / "tries"), "own" if own else "given"]
    command = [sys.executable, "-c", _COMMAND, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        said = ""
        if number is not None:
            while what not in said.splitlines():
                said += process.stderr.readline()
            process.send_signal(number)
        out, more = process.communicate(timeout=60)
    return process.returncode, out, said + more, (folder / "tries").read_text().split()


def test_the_result_comes_back_and_standard_output_is_the_commands_alone(tmp_path: Path) -> None:
    assert drive("works", tmp_path) == (0, "the result\n", "from Ray\n", ["False"])


@pytest.mark.parametrize(
    ("what", "code", "reason"),
    [
        ("refuses", 2, "lockstep: ranks: 9 given"),
        ("fails", 3, "lockstep: rank 1 failed at step 3: it died"),
        ("strange", 3, "lockstep: Strange: one of a kind"),
        ("exits", 3, "lockstep: the Ray driver process was told to exit (SystemExit: 1)"),
    ],
)
def test_errors_come_back_as_what_they_are(what: str, code: int, reason: str, tmp_path: Path) -> None:
    ended, out, said, tries = drive(what, tmp_path)
    assert (ended, out, tries) == (code, "", ["False"])
    assert reason in said


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("dies once", "the Ray driver process ended unexpectedly; continuing with a new Ray"),
        ("stops", "the Ray driver process sent no heartbeat"),
        ("stuck", "Ray does not answer: ray.wait; continuing with a new Ray"),
        ("lost", "Ray's raylet died; continuing with a new Ray"),
    ],
)
def test_a_lost_driver_is_replaced_by_one_that_goes_on(what: str, reason: str, tmp_path: Path) -> None:
    code, out, said, tries = drive(what, tmp_path)
    assert (code, out, tries) == (0, "the result\n", ["False", "True"])
    assert reason in said


@pytest.mark.parametrize("own", [True, False])
def test_what_a_lost_driver_has_done_is_not_done_again(own: bool, tmp_path: Path) -> None:
    code, out, said, tries = drive("leaves its work done", tmp_path, own=own)
    assert (code, out, tries) == (0, "made without it\n", ["False"])
    assert "the Ray driver process ended unexpectedly, but its work was done" in said


def test_drivers_are_not_replaced_for_ever(tmp_path: Path) -> None:
    code, out, said, tries = drive("dies", tmp_path)
    assert (code, out, tries) == (3, "", ["False", "True", "True"])
    assert "Ray was started 3 times" in said


def test_drivers_that_were_lost_long_ago_do_not_count(tmp_path: Path) -> None:
    code, out, _, tries = drive("dies now and then", tmp_path)
    assert (code, out, tries) == (0, "the result\n", ["False", "True", "True", "True", "True"])


def test_a_signal_after_the_work_costs_nothing(tmp_path: Path) -> None:
    assert drive("has ended", tmp_path, number=signal.SIGTERM)[:2] == (0, "the result\n")


def test_a_cluster_of_others_is_not_started_again(tmp_path: Path) -> None:
    code, _, said, tries = drive("lost", tmp_path, own=False)
    assert (code, tries) == (3, ["False"])
    assert "Ray's raylet died; the cluster of RAY_ADDRESS" in said


@pytest.mark.parametrize(
    ("what", "reason"), [("hears", "cancelled (stopped after step 3)"), ("deaf", "cancelled")]
)
def test_a_signal_ends_it_whether_or_not_the_driver_can_hear(what: str, reason: str, tmp_path: Path) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        code, out, said, _ = drive(what, tmp_path, number=number)
        assert (code, out) == (130, "")
        assert reason in said and "Traceback" not in said


def test_a_driver_that_cannot_leave_ray_keeps_nobody(tmp_path: Path) -> None:
    assert drive("does not leave", tmp_path)[:2] == (0, "the result\n")


@pytest.mark.parametrize(
    ("moment", "victim", "how"),
    [
        ("before the end", "driver", "killed"),
        ("before the end", "keeper", "killed"),
        ("before the end", "keeper", "stopped"),
        ("at the end", "driver", "killed"),
        ("at the end", "driver", "stopped"),
        ("at the end", "keeper", "killed"),
        ("at the end", "keeper", "stopped"),
    ],
)
def test_the_result_comes_and_nothing_is_left_whoever_is_hit_last(
    moment: str, victim: str, how: str, tmp_path: Path
) -> None:
    """Just before or after the driver says that it is done."""
    code, out, _, tries = drive(f"{moment} the {victim} is {how}", tmp_path)
    assert (code, out) == (0, "the result\n")
    lost = moment == "before the end" and how == "killed"
    assert tries == ["False", "True"][: 1 + lost]
    for pid in map(int, (tmp_path / "started").read_text().split()):
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
