"""A process's first moments: signals and the current folder, before anything slow is imported."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import FrameType
from typing import NoReturn

from runtime.parallel.signals import ending_signals

_BAD_REQUEST, _CANCELLED = 2, 130


def begin() -> None:
    """Let a signal end this process without a traceback, and refuse a current folder that was deleted.

    In such a folder torch's libraries end the process as they load. Call this before importing anything else.
    """
    for number in ending_signals():
        signal.signal(number, _cancelled)
    try:
        Path.cwd()
    except OSError:
        _end(_BAD_REQUEST, "the current folder was deleted; change to another one")


def _cancelled(number: int, frame: FrameType | None) -> None:
    """End at once: nothing has begun yet."""
    _end(_CANCELLED, "cancelled")


def _end(code: int, reason: str) -> NoReturn:
    if os.environ.get("RANK", "0") == "0":  # of torchrun; one rank says it for all
        os.write(2, f"lockstep: {reason}\n".encode())
    os._exit(code)
