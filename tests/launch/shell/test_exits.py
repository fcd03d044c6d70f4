"""How a process ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

from launch.shell.exits import advising, check_arguments, run_command
from runtime.errors import BadRequestError, JobFailedError
from tests.places import ROOT

ENDING = """
import atexit, ctypes, sys, threading, time
from launch.shell.exits import end_with
libc = ctypes.CDLL(None)
libc.__cxa_atexit(ctypes.cast(libc.abort, ctypes.c_void_p), None, None)  # what C++ would clean up

def run(arguments):
    atexit.register(print, "cleaned up")
    threading.Thread(target=lambda: (time.sleep(0.2), print("thread done"))).start()
    return int(arguments[0])

{end}
"""


def ended(end: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", ENDING.format(end=end), "3"]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_python_cleans_up_and_libraries_do_not() -> None:
    done = ended("end_with(run)")
    assert (done.returncode, done.stdout) == (3, "thread done\ncleaned up\n"), done.stderr
    assert ended("sys.exit(run(sys.argv[1:]))").returncode < 0  # there is something to skip


def test_a_signal_while_an_error_is_explained_gives_no_traceback() -> None:
    done = ended("def run(arguments):\n    raise KeyboardInterrupt\n\nend_with(run)")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_advice_that_cannot_be_given_hides_no_error() -> None:
    def advice() -> str:
        raise FileNotFoundError("the working directory is gone")

    with pytest.raises(JobFailedError, match="rank 1 died"), advising(advice):
        raise JobFailedError("rank 1 died")


CLOSED = """
import os, sys
from launch.shell.exits import end_with

def run(arguments):
    opened = os.open("out.txt", os.O_CREAT | os.O_WRONLY)
    print("a path")
    print("progress", file=sys.stderr)
    return 3 if opened > 2 else 4

end_with(run)
"""


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_nothing_special(tmp_path: Path, closed: str) -> None:
    """And what is printed does not land in the file that gets their numbers."""
    root = str(ROOT)
    command = f'exec "$0" -c "$1" {closed}'
    done = subprocess.run(
        ["bash", "-c", command, sys.executable, CLOSED],
        cwd=tmp_path, env={"PYTHONPATH": root}, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 3, done
    assert done.stdout == ("" if ">&-" in closed.replace("2>&-", "") else "a path\n")
    assert done.stderr == ("" if "2>&-" in closed else "progress\n")
    assert (tmp_path / "out.txt").read_text() == ""


LEFT = """
import sys
from launch.shell.exits import end_with

def run(arguments):
    for number in range(20000):
        print("step", number, file=sys.stderr)
    print("a path")
    open("done", "w").close()
    return 0

end_with(run)
"""


@pytest.mark.parametrize("reader", ["2>&1 | head -1", "2>&1 | true", "2>/dev/full | cat"])
def test_a_job_goes_on_when_nobody_listens_any_more(tmp_path: Path, reader: str) -> None:
    root = str(ROOT)
    done = subprocess.run(
        ["bash", "-c", f'"$0" -c "$1" {reader}; exit ${{PIPESTATUS[0]}}', sys.executable, LEFT],
        cwd=tmp_path, env={"PYTHONPATH": root, "PATH": os.environ["PATH"]}, capture_output=True, text=True,
        check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done
    assert (tmp_path / "done").exists()
    assert "Error" not in done.stdout + done.stderr


TELLING = """
from launch.shell.exits import end_with, run_command
import click
from launch.shell.terminal import print_path

@click.command()
@click.option("--path/--other")
def tell(path):
    print_path("a.mp4") if path else print("a table")

end_with(lambda arguments: run_command(tell, arguments, "tell"))
"""


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (
            "--path",
            "stdout: cannot print the path of the result, 'a.mp4', which is written: No space left on device",
        ),
        ("--other", "'standard output': No space left on device"),
    ],
)
def test_what_cannot_be_told_is_said_to_be_there(option: str, said: str) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", TELLING, option], stdout=full, stderr=subprocess.PIPE, text=True,
            check=False, timeout=60,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (3, f"lockstep: {said}\n")


SIGNALLED = """
import signal, sys
from launch.shell.exits import end_with

def run(arguments):
    signal.signal(signal.SIGALRM, lambda *_: print("heard", file=sys.stderr))
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.0005)
    for number in range(20000):
        print("step", number, file=sys.stderr)
    signal.setitimer(signal.ITIMER_REAL, 0)
    return 0

end_with(run)
"""


def test_a_signal_s_handler_may_speak_at_any_time() -> None:
    command = [sys.executable, "-c", SIGNALLED]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("heard") > 10 and "step 19999" in done.stderr


def test_arguments_are_text() -> None:
    check_arguments(["generate", "猫", "--out", "a.mp4"])
    with pytest.raises(BadRequestError, match=r"argument 'caf\\xe9' given; its byte 0xe9 is not UTF-8"):
        check_arguments(["generate", "caf\udce9"])


@click.command()
@click.argument("advice")
def failing(advice: str) -> None:
    with advising(lambda: advice):
        raise JobFailedError("the disk is full")


@pytest.mark.parametrize("advice", ["buy another", ""])
def test_advice_is_what_the_command_says(advice: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command(failing, [advice], "fail") == 3
    said = capfd.readouterr().err.splitlines()
    assert said == ["lockstep: the disk is full", *([f"lockstep: {advice}"] if advice else [])]


@click.command()
@click.argument("name")
def opening(name: str) -> None:
    Path(name).open("rb").close()


@pytest.mark.parametrize("name", ["none/a.mp4", "file/a.mp4", "x" * 300])
def test_whatever_the_file_system_says_is_told_in_words_with_the_file(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    path = str(tmp_path / name)
    with pytest.raises(OSError) as caught:
        Path(path).open().close()
    assert run_command(opening, [path], "open") == 3
    assert capfd.readouterr().err == f"lockstep: {path!r}: {caught.value.strerror}\n"
