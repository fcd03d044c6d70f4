"""How a process ends."""

from __future__ import annotations

import subprocess
import sys

ENDING = """
import atexit, ctypes, sys, threading, time
from launch.exits import end_with
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
