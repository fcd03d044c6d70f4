"""A process with all that it starts: whoever is killed, nothing of it is left.

    command ── keeper ── main ── whatever it starts, and what that starts

The keeper begins a session of its own, adopts orphans, and ends everything in it when `main` ends or the
command is no more. Should the keeper be what is killed, `main` ends with it and the command ends the rest.
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
from typing import NoReturn

import psutil

_LOOK = 0.1  # seconds between two looks at what has ended
_PATIENCE = 10.0  # seconds that the keeper has to end everything, after which the command does
_DEATH_SIGNAL, _SUBREAPER = 1, 36  # of prctl(2)
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Family:
    """`main` in a process of its own, forked from this one.

    This one should have one thread, and must not have used Ray: its libraries' threads are not there in the
    fork, and what they held stays held.

    Args:
        main: never has to return; the process ends with it, and its session with the process.
    """

    def __init__(self, main: Callable[[], None]):
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):
                stream.flush()  # what is not told yet would be told twice
        end, self._leash = os.pipe()
        self._over = False
        self._keeper = os.fork()
        if self._keeper == 0:
            os.close(self._leash)
            _keep(main, end)
        os.close(end)

    @property
    def over(self) -> bool:
        """Whether everything has ended."""
        if not self._over:
            with suppress(ChildProcessError):
                self._over = os.waitpid(self._keeper, os.WNOHANG)[0] != 0
        return self._over

    def end(self, patience: float = 0.0) -> None:
        """End everything; `main` has `patience` seconds to end by itself."""
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
    """The keeper's life."""
    try:
        os.setsid()
        _prctl(_SUBREAPER, 1)
        heed_no_signals()
        keeper, child = os.getpid(), os.fork()
        if child == 0:
            os.close(leash)
            _prctl(_DEATH_SIGNAL, signal.SIGKILL)
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
    """Leave them to the command; to be called again where a library has taken them."""
    for number in _SIGNALS:
        signal.signal(number, _nothing)  # but not ignored: that, programs inherit


def _nothing(number: int, frame: object) -> None:
    """The command hears signals and tells `main`."""


def _close_all_but(kept: int) -> None:
    """What is open belongs to others, who go by its end."""
    os.closerange(3, kept)
    os.closerange(kept + 1, os.sysconf("SC_OPEN_MAX"))


def _reap() -> int:
    """A child that has ended, its own or adopted; 0 if there is none."""
    try:
        return os.waitpid(-1, os.WNOHANG)[0]
    except ChildProcessError:
        return 0


def _of_session(session: int) -> Iterator[psutil.Process]:
    """Processes of a session but its leader."""
    for process in psutil.process_iter():
        with suppress(OSError, psutil.Error):
            if os.getsid(process.pid) == session and process.pid != session:
                yield process


def _end_all(members: Callable[[], set[psutil.Process]], reap: Callable[[], int] = lambda: 0) -> None:
    """Kill processes until there are none; one that is killed may have started another just before."""
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        left = 0
        for process in members():
            with suppress(psutil.Error):
                if process.status() != psutil.STATUS_ZOMBIE:
                    process.kill()
                    left += 1
        while reap():
            pass
        if not left:
            return
        time.sleep(_LOOK / 4)


def _prctl(option: int, value: int) -> None:
    """Linux only; elsewhere the session is all that holds the family together."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
