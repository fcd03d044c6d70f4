"""Lock files that Lockstep leaves in a user's folders, and locks on files that are being written.

The operating system holds the locks: a lock ends with the process that holds it, however that ends, and is
more reliable than a process number or host name. A file with a lock's name that is not Lockstep's is kept.
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from runtime.errors import BadRequestError

_MARK = "process "  # beginning of our lock files; before the first holder, they are empty
_TRIES = 1000  # attempts to lock a file that others create and remove meanwhile
_PATIENCE, _LOOK = 20.0, 0.02  # seconds to wait for a process that changes a file, and between two looks


def hold(path: Path, *, field: str, said: Callable[[str], str]) -> IO[str]:
    """Lock the file at `path` until it is closed; create it if it is missing.

    Args:
        path: the lock file.
        field: field that names the folder.
        said: makes the message for a lock that another process holds, from the name of that process.

    Raises:
        BadRequestError: another process holds it; or it is not a regular file, or not one of our lock files,
            or is removed again and again.
        OSError: it cannot be opened, or its folder does not exist.
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
        lock.close()  # the former holder removed it; another process may hold the new one
    raise BadRequestError(f"{field}: {str(path)!r} is removed again and again; choose another folder")


@contextmanager
def alone_in(folder: Path, *, field: str) -> Iterator[None]:
    """Run the block, which reads a file of the folder and replaces it, while no other process does the same.

    The folder itself is locked, so nothing is left behind. Where folders cannot be locked, nothing is.

    Raises:
        BadRequestError: other processes hold the folder for too long.
        OSError: it does not exist.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        until = time.monotonic() + _PATIENCE
        while not _locked(descriptor):
            if time.monotonic() > until:
                raise BadRequestError(
                    f"{field}: another process changes files in {str(folder)!r} and does not end; try again"
                )
            time.sleep(_LOOK)
        yield
    finally:
        os.close(descriptor)


def _locked(descriptor: int) -> bool:
    """Try to lock an open folder; return False if another process holds it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system that cannot lock folders
        pass
    return True


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
    """Return whether the open file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False
