"""A driver of Ray in a process of its own, and the command that waits for it.

Ray ends its driver's process when one of its own dies, and can keep it in a call for good when one has
stopped. The command has nothing to do with Ray, so it outlives that: it owns the terminal, the signals and
the exit code, gives up a driver without a pulse, and goes on with a new one where the driver's Ray was its
own.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from types import FrameType
from typing import Any, Generic, TypeVar

from rich.console import Console

from launch.shell.endings import ending_signals
from launch.shell.family import Family
from launch.shell.pulse import Pulse
from launch.shell.terminal import say
from runtime.errors import CancelledError, JobFailedError, LockstepError

log = logging.getLogger("launch")

TRIES = 3  # drivers that a command may use up within an hour
_MEMORY = 3600.0  # seconds after which the loss of one is forgotten
_BEAT = 1.0  # seconds between two signs of life
_SILENCE = 30.0  # seconds without any, after which a driver is given up
_DEAF = 5.0  # seconds that a driver has to answer a signal
_LEAVING = 10.0  # seconds that a driver has to leave Ray in order, when its work is done
_ENDED = "the process that drives Ray was ended"
_SAME = 1.0  # seconds within which two signals are one

_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class Beat:
    """A driver is alive."""


@dataclass(frozen=True, slots=True)
class Heard:
    """A driver was told to stop.

    Attributes:
        stops: it will, after a step; otherwise there is nothing to be kept and it can be ended.
    """

    stops: bool


@dataclass(frozen=True, slots=True)
class Done(Generic[_Result]):
    """A driver's work is done."""

    value: _Result


@dataclass(frozen=True, slots=True)
class Raised:
    """A driver's work has ended with an error."""

    error: BaseException


@dataclass(frozen=True, slots=True)
class Lost:
    """A driver's Ray is gone, or the driver is."""

    reason: str


class Driver:
    """What the work in a driver's process is given.

    Attributes:
        again: another driver was at it before and was lost; there is something to go on from.
        pulse: what calls into Ray are to be announced to.
        look: called where something has failed; does not return if Ray is gone.
    """

    def __init__(self, line: Connection, *, again: bool):
        self.again, self.pulse = again, Pulse()
        self.look: Callable[[], None] = lambda: None
        self._line, self._lock = line, threading.Lock()
        self._stop: Callable[[], bool] = lambda: False

    @contextmanager
    def stopped_by_signals(self, stop: Callable[[], bool]) -> Iterator[None]:
        """Let a signal that the command gets call `stop`, in another thread; see `launch.shell.signals`."""
        self._stop = stop
        try:
            yield
        finally:
            self._stop = lambda: True  # the work is over, and what came of it is told at once

    def done(self, value: object) -> None:
        """The work is done; what is still to come is not waited for long."""
        self._tell(Done(value))

    def lost(self, reason: str) -> None:
        """Ray is gone; this process will be ended."""
        self._tell(Lost(reason))

    def run(self, work: Callable[[Driver], None]) -> None:
        """Do the work, and tell how it ended if the work itself has not."""
        for talk in (self._beat, self._listen):
            threading.Thread(target=talk, daemon=True).start()
        try:
            work(self)
        except BaseException as error:
            if not isinstance(error, LockstepError | KeyboardInterrupt):
                log.exception("unexpected failure")
            self._tell(Raised(_portable(error)))

    def _beat(self) -> None:
        while (overdue := self.pulse.overdue()) is None:
            self._tell(Beat())
            time.sleep(_BEAT)
        self.lost(f"Ray does not answer: {overdue}")

    def _listen(self) -> None:
        with suppress(EOFError, OSError):
            while True:
                self._line.recv()
                self._tell(Heard(self._stop()))

    def _tell(self, message: object) -> None:
        with self._lock, suppress(OSError):  # a command that is gone needs to know nothing
            self._line.send(message)


def _portable(error: BaseException) -> BaseException:
    """The error, or where it does not survive the way to another process, one that says the same."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever others' classes raise then
        return JobFailedError(f"{type(error).__name__}: {error}")
    return error


def drive(work: Callable[[Driver], None], console: Console, *, own: bool) -> Any:
    """Do `work` in a process of its own, and in another one when that is lost; what it says to be done with.

    Args:
        work: calls `Driver.done` once.
        own: the Ray that it works on begins and ends with it, so another driver can have another one.

    Raises:
        CancelledError: a signal came, or the work raised it.
        JobFailedError: too many drivers were lost.
        Exception: what the work raised.
    """
    lost: list[float] = []  # when
    again = False
    while True:
        ended = _Attempt(work, console, again=again).follow()
        if isinstance(ended, Done):
            return ended.value
        if isinstance(ended, Raised):
            raise ended.error
        again, now = True, time.monotonic()
        lost = [*(when for when in lost if now - when < _MEMORY), now]
        if not own:
            raise JobFailedError(
                f"{ended.reason}; the cluster of RAY_ADDRESS was not started by this command"
            )
        if len(lost) == TRIES:
            raise JobFailedError(
                f"{ended.reason} (Ray was started {TRIES} times within {_MEMORY / 60:.0f} min)"
            )
        say(console, f"{ended.reason}; going on with a new Ray")


class _Attempt:
    """One driver, as the command sees it."""

    def __init__(self, work: Callable[[Driver], None], console: Console, *, again: bool):
        self._console = console
        self._line, theirs = Pipe()
        self._asked: list[float] = []  # when signals came
        self._told = False  # the driver knows of the first
        self._stops = False  # and will stop
        self._family = Family(lambda: self._drive(work, theirs, again=again))
        theirs.close()

    def _drive(self, work: Callable[[Driver], None], line: Connection, *, again: bool) -> None:
        """The driver's process. Standard output is the command's alone, whatever Ray has to say."""
        self._line.close()
        with suppress(OSError):
            os.dup2(2, 1)
        code = 1
        try:
            Driver(line, again=again).run(work)
            code = 0
        finally:
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError, ValueError, AttributeError):
                    stream.flush()
            os._exit(code)

    def follow(self) -> Done[Any] | Raised | Lost:
        """Wait for its end, and see to it that nothing is left of it."""
        before = {number: signal.signal(number, self._hear) for number in ending_signals()}
        ended: Done[Any] | Raised | Lost = Raised(CancelledError("ended at once"))
        try:
            ended = self._end()
        finally:
            self._family.end(_LEAVING if isinstance(ended, Done) else 1.0 if isinstance(ended, Raised) else 0)
            for number, handler in before.items():
                signal.signal(number, handler)
            self._line.close()
            if self._console.is_terminal:
                self._console.show_cursor()  # a display that was killed has hidden it
        return ended

    def _hear(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self._asked or now - self._asked[-1] > _SAME:
            self._asked.append(now)

    def _end(self) -> Done[Any] | Raised | Lost:
        heard = time.monotonic()
        while True:
            if self._line.poll(_BEAT / 5):
                heard = time.monotonic()
                try:
                    message = self._line.recv()
                except (EOFError, OSError):
                    return self._stopped(_ENDED) or Lost(_ENDED)
                if isinstance(message, Done | Raised | Lost):
                    return (self._stopped(message.reason) if isinstance(message, Lost) else None) or message
                if isinstance(message, Heard):
                    self._note(message)
            elif time.monotonic() - heard > _SILENCE:
                silent = f"the driver of Ray has shown no sign of life for {_SILENCE:.0f} s"
                return self._stopped(silent) or Lost(silent)
            if self._asked and not self._told:
                self._told = True
                with suppress(OSError):
                    self._line.send("stop")
            if self._gives_up():
                return Raised(CancelledError("ended at once"))

    def _note(self, heard: Heard) -> None:
        self._stops = heard.stops
        if heard.stops:
            log.warning("stopping at the end of a step; once more stops at once")
        else:
            self._asked.append(0.0)  # there is nothing to be kept

    def _gives_up(self) -> bool:
        """Whether the driver is to be ended now: at a second signal, or when it does not hear the first."""
        deaf = bool(self._asked) and not self._stops and time.monotonic() - self._asked[0] > _DEAF
        return deaf or len(self._asked) > 1

    def _stopped(self, why: str) -> Raised | None:
        """After a signal, whatever happens to the driver is the end."""
        return Raised(CancelledError(f"while it stopped: {why}")) if self._asked else None
