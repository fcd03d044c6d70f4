"""Runs a command that is told to end when the process that started it ends, even by SIGKILL.

`python -m launch.shell.tied PARENT COMMAND…`, where PARENT is the process id of whoever starts it.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

from launch.shell.family import die_with_parent
from runtime.files.interpreter import interpreter


def tied(command: Sequence[str]) -> list[str]:
    """The command line that runs `command` tied to this process; start it in a thread that stays."""
    return [*interpreter(), "-m", __name__, str(os.getpid()), *command]


def main() -> None:
    """Become the command, unless the parent has ended already."""
    parent, *command = sys.argv[1:]
    die_with_parent(signal.SIGTERM)
    if os.getppid() == int(parent):
        os.execv(command[0], command)


if __name__ == "__main__":
    main()
