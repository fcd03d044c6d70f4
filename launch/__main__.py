"""Entry point of `lockstep` and `python -m launch`.

Installs signal handlers before anything else is imported, so that an early Ctrl-C gives no traceback.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import FrameType

from runtime.parallel.signals import ending_signals

_BAD_REQUEST, _CANCELLED = 2, 130


def main() -> None:
    """Run the command line."""
    for number in ending_signals():
        signal.signal(number, _end)
    _check_folder()
    from launch.cli import main as run

    run()


def _check_folder() -> None:
    """Refuse to start in a folder that was deleted, where torch's libraries end the process as they load."""
    try:
        Path.cwd()
    except OSError:
        os.write(2, b"lockstep: the current folder was deleted; change to another one\n")
        os._exit(_BAD_REQUEST)


def _end(number: int, frame: FrameType | None) -> None:
    """End at once: nothing has begun yet."""
    os.write(2, b"lockstep: cancelled\n")
    os._exit(_CANCELLED)


if __name__ == "__main__":
    main()
