"""The pulse of a process: whether what it waits for has answered in time."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Pulse:
    """Calls that should have returned by now; any thread may make one, and any may ask.

    A call into Ray can wait for a process that has stopped, whatever timeout it was given. Nothing in the
    thread that made it can end it; somebody else has to know.

    Example:
        >>> pulse = Pulse()
        >>> with pulse.within(30.0, "placing the ranks"):
        ...     actor.place.remote()
    """

    def __init__(self) -> None:
        self._lock, self._numbers = threading.Lock(), itertools.count()
        self._due: dict[int, tuple[float, str]] = {}

    @contextmanager
    def within(self, seconds: float, doing: str) -> Iterator[None]:
        """What the block does takes at most so many seconds, or something is broken."""
        number = next(self._numbers)
        with self._lock:
            self._due[number] = time.monotonic() + seconds, doing
        try:
            yield
        finally:
            with self._lock:
                del self._due[number]

    def overdue(self) -> str | None:
        """What should have been done by now; None if all is well."""
        now = time.monotonic()
        with self._lock:
            return next((doing for due, doing in self._due.values() if now > due), None)
