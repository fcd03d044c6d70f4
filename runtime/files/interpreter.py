"""The interpreter that runs Lockstep's modules in other processes."""

from __future__ import annotations

import os
import sys
from contextlib import suppress


def interpreter() -> list[str]:
    """Beginning of a command line that runs a module as `python -m` does.

    Python puts the current folder first on its path then. A user's `random.py` or `launch.py` there would be
    run instead of the real one, so it is left out, unless this process found its modules there, too.
    """
    here = {""}
    with suppress(OSError):  # it was deleted
        here.add(os.getcwd())  # noqa: PTH109, as text, like the entries of the path
    return [sys.executable, *([] if here & {*sys.path} else ["-P"])]
