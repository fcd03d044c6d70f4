"""Other packages with the names of Lockstep's, which Python may find first. Imports nothing of Lockstep."""

from __future__ import annotations

import sys
import traceback

_OURS = ("launch", "runtime", "spectrum")
_REMEDY = (
    "rename or uninstall it, start Python in another folder, or install Lockstep into an environment of its "
    "own (docs/python.md)"
)


def in_the_way(error: BaseException) -> str:
    """Explain an import that failed as another package has a name of Lockstep's; empty for other errors."""
    if not isinstance(error, ImportError):
        return ""
    # PyPI's spectrum overwrites the file of ours, and imports what need not be installed.
    frames = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    name = "spectrum" if "spectrum" in frames else (error.name or "").partition(".")[0]
    if name not in _OURS:
        return ""
    found = getattr(sys.modules.get(name), "__file__", None) or _file_in(error, name)
    where = "is not there" if found is None else f"is {found!r}, which is not Lockstep's, or is incomplete"
    return f"the package {name!r} {where}: {_REMEDY}"


def _file_in(error: BaseException, name: str) -> str | None:
    """File of a module whose import failed, which is not among those that are there."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_globals.get("__name__") == name:
            return str(frame.f_globals.get("__file__"))
    return None
