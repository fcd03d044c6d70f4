"""What SIGINT and SIGTERM do to a running generation."""

from __future__ import annotations

import logging
import signal
import time
from types import FrameType

from runtime.coordinator import Command
from runtime.engine import Engine

log = logging.getLogger("launch")

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SAME = 1.0  # seconds: a terminal and an agent may both send one


def stop_on_signals(engine: Engine) -> None:
    """Let them stop `engine` after a step, the same on all ranks, with a checkpoint. Outside of denoising,
    and at the second one, it stops at once."""
    asked: list[float] = []

    def stop(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if asked and now - asked[0] < _SAME:
            return
        if asked or not engine.command(Command.STOP):
            raise KeyboardInterrupt
        asked.append(now)
        log.warning("stopping at the end of a step; once more stops at once")

    for number in _SIGNALS:
        signal.signal(number, stop)


def ignore_signals() -> None:
    """From now on they do nothing."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
