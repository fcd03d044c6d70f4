"""Other packages with the names of Lockstep's, which Python may find first. Imports nothing of Lockstep."""

from __future__ import annotations

import sys

_OURS = ("launch", "runtime", "spectrum")
REMEDY = (
    "rename it, start Python in another folder, or install Lockstep into an environment of its own "
    "(docs/python.md)"
)


def in_the_way(error: BaseException) -> str:
    """Explain an import that failed as another package has a name of Lockstep's; empty for other errors."""
    name = ((isinstance(error, ImportError) and error.name) or "").partition(".")[0]
    if name not in _OURS:
        return ""
    found = getattr(sys.modules.get(name), "__file__", None)
    where = "is not there" if found is None else f"is {found!r}, which is not Lockstep's, or is incomplete"
    return f"the package {name!r} {where}: {REMEDY}"
