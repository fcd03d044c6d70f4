"""Deadlines of calls that may hang, so that another thread can notice one that is overdue."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Pulse:
    """Registers calls with the time by which they should return. Thread-safe.

    A call into Ray can wait for a stopped process whatever timeout it was given, and the thread that made it
    cannot end it; another thread has to notice.

    Example:
        >>> pulse = Pulse()
        >>> with pulse.within(30.0, "placing the ranks"):
        ...     print("a call that may block")
        a call that may block
    """

    def __init__(self) -> None:
        self._lock, self._numbers = threading.Lock(), itertools.count()
        self._due: dict[int, tuple[float, str]] = {}

    @contextmanager
    def within(self, seconds: float, doing: str) -> Iterator[None]:
        """Expect the block, described by `doing`, to end within `seconds`."""
        number = next(self._numbers)
        with self._lock:
            self._due[number] = time.monotonic() + seconds, doing
        try:
            yield
        finally:
            with self._lock:
                del self._due[number]

    def overdue(self) -> str | None:
        """Description of a block that should have ended by now; None if there is none."""
        now = time.monotonic()
        with self._lock:
            return next((doing for due, doing in self._due.values() if now > due), None)
