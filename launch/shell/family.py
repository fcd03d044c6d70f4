"""A process and all its descendants, ended together: whichever of them is killed, none is left behind.

    command ── keeper ── main ── its children, and theirs

The keeper starts a session of its own, adopts orphans, and ends everything in the session when `main` or the
command ends. If the keeper itself is killed, `main` dies with it and the command ends the rest.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import psutil

from runtime.parallel.signals import ENDING

_LOOK = 0.1  # seconds between two checks of what has ended
_PATIENCE = 10.0  # seconds for the keeper to end everything, before the command does it
_DEATH_SIGNAL, _SUBREAPER = 1, 36  # of prctl(2)


class Family:
    """Runs `main` in a process of its own, forked from this one.

    This process should have a single thread and must not have used Ray: threads do not survive a fork, and
    locks that they held stay held.

    Args:
        main: need not return; its process ends with it, and the session with the process.
    """

    def __init__(self, main: Callable[[], None]):
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):
                stream.flush()  # buffered output would be printed twice
        end, self._leash = os.pipe()
        self._over = False
        self._keeper = os.fork()
        if self._keeper == 0:
            os.close(self._leash)
            _keep(main, end)
        os.close(end)

    @property
    def over(self) -> bool:
        """Whether the keeper, and with it everything else, has ended."""
        if not self._over:
            with suppress(ChildProcessError):
                self._over = os.waitpid(self._keeper, os.WNOHANG)[0] != 0
        return self._over

    def end(self, patience: float = 0.0) -> None:
        """End all processes, after giving `main` `patience` seconds to end by itself."""
        self._wait(patience)
        with suppress(OSError):
            os.close(self._leash)
        self._wait(_PATIENCE)
        if not self.over:
            os.kill(self._keeper, signal.SIGKILL)
            self._wait(_PATIENCE)
        _end_all(lambda: set(_of_session(self._keeper)))

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not self.over and time.monotonic() < deadline:
            time.sleep(_LOOK / 4)


def _keep(main: Callable[[], None], leash: int) -> NoReturn:
    """Body of the keeper process: start `main`, wait for its end or the command's, then end everything."""
    try:
        os.setsid()
        _prctl(_SUBREAPER, 1)
        heed_no_signals()
        keeper, child = os.getpid(), os.fork()
        if child == 0:
            os.close(leash)
            die_with_parent(signal.SIGKILL)
            if os.getppid() == keeper:
                main()
            os._exit(0)
        _close_all_but(leash)
        while _reap() != child and not select.select([leash], [], [], _LOOK)[0]:
            pass
        _end_all(lambda: {*psutil.Process().children(recursive=True), *_of_session(keeper)}, _reap)
    finally:
        os._exit(0)


def heed_no_signals() -> None:
    """Leave ending signals to the command. Call again after a library has installed its own handlers."""
    for number in ENDING:
        signal.signal(number, _nothing)  # not SIG_IGN, which child programs would inherit


def _nothing(number: int, frame: object) -> None:
    """Signal handler that does nothing: the command gets the signal and tells `main`."""


def _close_all_but(kept: int) -> None:
    """Close all inherited files, whose other ends wait for them to be closed.

    Only open ones: the limit may be a billion in a container, and closing each would take minutes.
    """
    for descriptor in [int(path.name) for path in Path("/dev/fd").iterdir()]:
        if descriptor > 2 and descriptor != kept:
            with suppress(OSError):  # the one with which the folder was read
                os.close(descriptor)


def _reap() -> int:
    """Reap one child, own or adopted; return its process id, or 0 if none has ended."""
    try:
        return os.waitpid(-1, os.WNOHANG)[0]
    except ChildProcessError:
        return 0


def _of_session(session: int) -> Iterator[psutil.Process]:
    """Yield the processes of a session except its leader."""
    for process in psutil.process_iter():
        with suppress(OSError, psutil.Error):
            if os.getsid(process.pid) == session and process.pid != session:
                yield process


def _end_all(members: Callable[[], set[psutil.Process]], reap: Callable[[], int] | None = None) -> None:
    """Kill processes until none is left; a killed one may just have started another.

    A zombie may have threads that are still there, with its files and locks: whoever can `reap` waits for it.
    """
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        left = 0
        for process in members():
            with suppress(psutil.Error):
                process.kill()
                left += reap is not None or process.status() != psutil.STATUS_ZOMBIE
        while reap is not None and reap():
            pass
        if not left:
            return
        time.sleep(_LOOK / 4)


def die_with_parent(number: signal.Signals) -> None:
    """Let this process get a signal when the thread that started it ends, however it does; on Linux only.

    The parent may have ended before: compare `os.getppid()` afterwards.
    """
    _prctl(_DEATH_SIGNAL, number)


def _prctl(option: int, value: int) -> None:
    """Call prctl(2), on Linux only; elsewhere the session alone holds the family together."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
