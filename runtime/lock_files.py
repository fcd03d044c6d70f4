"""Lock files that Lockstep leaves in a user's folders; what is called so and is not Lockstep's stays."""

from __future__ import annotations

from pathlib import Path
from typing import IO

from runtime.errors import BadRequestError

_MARK = "process "  # what a lock file of ours begins with; before anybody holds it, it is empty


def open_lock(path: Path, *, field: str) -> IO[str]:
    """The open lock file, made when it is missing; it is not locked yet.

    Raises:
        BadRequestError: it is a link, no file, or says something that no lock of ours does.
        OSError: it cannot be opened.
    """
    foreign = f"{field}: {str(path)!r} is not Lockstep's; move it, or choose another folder"
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise BadRequestError(foreign)
    lock = path.open("a+", encoding="utf-8", errors="replace")
    lock.seek(0)
    if lock.read(len(_MARK)) not in ("", _MARK):
        lock.close()
        raise BadRequestError(foreign)
    return lock
