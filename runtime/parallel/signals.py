"""Signals that end a process in an orderly way: which they are, and how many came.

Imports nothing else: handlers are installed first.
"""

from __future__ import annotations

import signal
import time

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SAME = 1.0  # seconds


def ending_signals() -> tuple[signal.Signals, ...]:
    """SIGINT, SIGTERM, and SIGHUP (sent when a terminal closes) unless `nohup` has it ignored."""
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        return tuple(number for number in ENDING if number != signal.SIGHUP)
    return ENDING


class SignalCount:
    """Counts signals that arrive; those within a second are one, as a terminal, an agent and a supervisor may
    all send it.

    Attributes:
        count: how many came.
    """

    def __init__(self) -> None:
        self.count, self._first, self._last = 0, 0.0, 0.0

    def hear(self) -> bool:
        """Count a signal that arrives now; return False if it is the one before, sent again."""
        now = time.monotonic()
        if self.count and now - self._last < _SAME:
            return False
        self._first, self._last = self._first if self.count else now, now
        self.count += 1
        return True

    def since(self) -> float:
        """Seconds since the first signal; 0 if none came."""
        return time.monotonic() - self._first if self.count else 0.0

    def forget(self) -> None:
        """Reset the count to 0."""
        self.count = 0
