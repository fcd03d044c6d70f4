"""Lock files that Lockstep leaves in a user's folders, and locks on files that are being written.

A lock is the system's: it ends with the process that holds it, whatever ends that, and no number of a process
or name of a machine says more. What is called as a lock file and is not Lockstep's stays.
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import IO

from runtime.errors import BadRequestError

_MARK = "process "  # what a lock file of ours begins with; before anybody holds it, it is empty
_TRIES = 1000  # to hold a file that others come to and leave meanwhile


def hold(path: Path, *, field: str, said: Callable[[str], str]) -> IO[str]:
    """The lock file, made when it is missing, held by this process until it is closed.

    Args:
        field: what the user named the folder with.
        said: what is said when another holds it, given who that is.

    Raises:
        BadRequestError: another holds it; or it is a link, no file, or says something that no lock of ours
            does, or it does not stay.
        OSError: it cannot be opened, or its folder is not there.
    """
    for _ in range(_TRIES):
        lock = _open(path, field)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            who = lock.read().strip() or "another process"
            lock.close()
            raise BadRequestError(said(who)) from None
        except OSError:
            lock.close()
            raise
        if is_at(lock.fileno(), path):
            lock.truncate(0)
            lock.write(f"{_MARK}{os.getpid()} on {socket.gethostname()}\n")
            lock.flush()
            return lock
        lock.close()  # it was removed by who held it before; another may hold its successor
    raise BadRequestError(f"{field}: {str(path)!r} does not stay; choose another folder")


def _open(path: Path, field: str) -> IO[str]:
    foreign = f"{field}: {str(path)!r} is not Lockstep's; move it, or choose another folder"
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise BadRequestError(foreign)
    lock = path.open("a+", encoding="utf-8", errors="replace")
    lock.seek(0)
    if lock.read(len(_MARK)) not in ("", _MARK):
        lock.close()
        raise BadRequestError(foreign)
    return lock


def is_at(descriptor: int, path: Path) -> bool:
    """Whether `path` is still the open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False
