"""A Ray driver in a process of its own, and the command that waits for it.

Ray ends its driver's process when one of its own processes dies, and can block it in a call for ever when one
is stopped. The command itself does not use Ray, so it survives both: it owns the terminal, the signals and
the exit code, abandons a driver that sends no heartbeat, and continues with a new one if Ray was its own.
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

from launch.shell.family import Family
from launch.shell.pulse import Pulse
from launch.shell.terminal import say
from runtime.errors import CancelledError, JobFailedError, LockstepError, named
from runtime.parallel.signals import SignalCount, ending_signals

log = logging.getLogger("launch")

TRIES = 3  # drivers that a command may lose within an hour, the last one included
_MEMORY = 3600.0  # seconds after which a loss no longer counts
_BEAT = 1.0  # seconds between two heartbeats
_SILENCE = 30.0  # seconds without a heartbeat after which a driver is abandoned
_DEAF = 5.0  # seconds for a driver to answer a signal
_LEAVING = 10.0  # seconds for a driver to leave Ray in order when its work is done
_ENDED = "the Ray driver process ended unexpectedly"

_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class Beat:
    """Heartbeat: the driver is alive."""


@dataclass(frozen=True, slots=True)
class Heard:
    """A driver's answer to a signal.

    Attributes:
        stops: it will stop after a step; otherwise there is nothing to save and it can be killed.
    """

    stops: bool


@dataclass(frozen=True, slots=True)
class Done(Generic[_Result]):
    """Message: the driver's work is done, with its result."""

    value: _Result


@dataclass(frozen=True, slots=True)
class Raised:
    """The driver's work raised an error."""

    error: BaseException


@dataclass(frozen=True, slots=True)
class Lost:
    """The driver was lost, or its Ray was."""

    reason: str


class Driver:
    """The driver's side of the connection to the command; passed to the work.

    Attributes:
        again: an earlier driver worked on this and was lost, so there may be something to resume from.
        pulse: registers calls into Ray, so that one that hangs is noticed.
        look: to be called after a failure; does not return if Ray was lost.
    """

    def __init__(self, line: Connection, *, again: bool):
        self.again, self.pulse = again, Pulse()
        self.look: Callable[[], None] = lambda: None
        self._line, self._lock = line, threading.Lock()
        self._stop: Callable[[], bool] = lambda: False

    @contextmanager
    def stopped_by_signals(self, stop: Callable[[], bool]) -> Iterator[None]:
        """Call `stop` in another thread when the command gets a signal; see `launch.shell.signals`."""
        self._stop = stop
        try:
            yield
        finally:
            self._stop = lambda: True  # the work is over, and its result is reported at once

    def done(self, value: object) -> None:
        """Report the result; what the driver still does afterwards is not waited for long."""
        self._tell(Done(value))

    def lost(self, reason: str) -> None:
        """Report that Ray was lost; the command will end this process."""
        self._tell(Lost(reason))

    def run(self, work: Callable[[Driver], None]) -> None:
        """Do the work, and report an error that it raises."""
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
        with self._lock, suppress(OSError):  # the command may be gone
            self._line.send(message)


def _portable(error: BaseException) -> BaseException:
    """Return the error, or a JobFailedError with its message if it cannot be pickled or is SystemExit, which
    Ray raises and which would end the command without a word."""
    if isinstance(error, SystemExit):
        return JobFailedError(f"the Ray driver process was told to exit ({named(error)})")
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever other libraries' classes raise
        return JobFailedError(named(error))
    return error


def drive(
    work: Callable[[Driver], None], console: Console, *, own: bool, made: Callable[[], Any] = lambda: None
) -> Any:
    """Run `work` in a driver process, and in a new one when that is lost; returns what it passes to `done`.

    Args:
        work: calls `Driver.done` once.
        own: the driver starts its own Ray, so that a new driver can start a new one.
        made: returns the result if it is there although the driver was lost, None if it is not.

    Raises:
        CancelledError: a signal came, or the work raised it.
        JobFailedError: too many drivers were lost.
        Exception: whatever the work raised.
    """
    lost: list[float] = []  # times of losses
    again = False
    while True:
        ended = _Attempt(work, console, again=again).follow()
        if isinstance(ended, Done):
            return ended.value
        if isinstance(ended, Raised):
            raise ended.error
        result = made()
        if result is not None:
            say(console, f"{ended.reason}, but its work was done")
            return result
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
        say(console, f"{ended.reason}; continuing with a new Ray")


class _Attempt:
    """One driver process, as the command sees it."""

    def __init__(self, work: Callable[[Driver], None], console: Console, *, again: bool):
        self._console = console
        self._line, theirs = Pipe()
        self._asked = SignalCount()
        self._told = False  # the driver was told of the first
        self._answer: Heard | None = None  # what it answered
        self._family = Family(lambda: self._drive(work, theirs, again=again))
        theirs.close()

    def _drive(self, work: Callable[[Driver], None], line: Connection, *, again: bool) -> None:
        """Body of the driver process. Its stdout goes to stderr; results are printed by the command."""
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
        """Wait for the driver to end, and clean up everything that it started."""
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
                self._console.show_cursor()  # a killed progress display leaves it hidden
        return ended

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._asked.hear()

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
                silent = f"the Ray driver process sent no heartbeat for {_SILENCE:.0f} s"
                return self._stopped(silent) or Lost(silent)
            if self._asked.count and not self._told:
                self._told = True
                with suppress(OSError):
                    self._line.send("stop")
            if self._gives_up():
                return Raised(CancelledError("ended at once"))

    def _note(self, heard: Heard) -> None:
        self._answer = heard
        if heard.stops:
            log.warning("stopping after this step; a second signal stops immediately")

    def _gives_up(self) -> bool:
        """Return whether to kill the driver now: after a second signal, or if it has nothing to save or does
        not answer the first."""
        if self._answer is None:
            return self._asked.count > 1 or self._asked.since() > _DEAF
        return self._asked.count > 1 or not self._answer.stops

    def _stopped(self, why: str) -> Raised | None:
        """Turn the loss of a driver after a signal into a cancellation; None if no signal came."""
        return Raised(CancelledError(f"while stopping: {why}")) if self._asked.count else None
