"""`lockstep`, and `python -m launch`, which is the same.

Signals are heard before anything else is imported: whoever presses Ctrl-C at once gets no traceback.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

from launch.shell.endings import ending_signals

_CANCELLED = 130


def main() -> None:
    """Entry point."""
    for number in ending_signals():
        signal.signal(number, _end)
    from launch.cli import main as run

    run()


def _end(number: int, frame: FrameType | None) -> None:
    """Nothing has begun yet."""
    os.write(2, b"lockstep: cancelled\n")
    os._exit(_CANCELLED)


if __name__ == "__main__":
    main()
