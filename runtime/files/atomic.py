"""Atomic writes: files appear whole or not at all, and have a temporary name until they are done."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import os
import re
import secrets
import socket
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from runtime.errors import JobFailedError
from runtime.files.locks import is_at

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LONGEST = 100  # bytes of a file's name that its temporary name repeats; the file system's limit is 255


@contextmanager
def whole_file(path: Path, *, overwrite: bool = True) -> Iterator[Path]:
    """Yield a temporary file beside `path`; when the block succeeds, flush it to disk and rename it.

    When the block raises, the temporary file is removed and `path` stays as it was; if the process is killed,
    the next process that writes `path` removes it. The temporary name keeps the suffix of `path`, from which
    ffmpeg infers the format.

    Args:
        path: final name.
        overwrite: whether a file that has appeared at `path` by then may be replaced.

    Raises:
        JobFailedError: the disk is full, or see `_keep_both`.
    """
    stays = _nothing if overwrite else os.path.lexists
    with _whole([path], stays, overwrite=overwrite) as temporaries:
        yield temporaries[0]


@contextmanager
def whole_files(paths: Sequence[Path], *, overwrite: bool) -> Iterator[list[Path]]:
    """Write several files that belong together, as `whole_file` does; they appear in order, at the end.

    If a folder has appeared at one of their names, none of them is replaced, either; see `_keep_both`.
    """
    with _whole(paths, partial(is_in_the_way, overwrite=overwrite), overwrite=overwrite) as temporaries:
        yield temporaries


def is_no_room(error: BaseException | None) -> bool:
    """Return whether an error says that the disk or a quota of it is full."""
    return isinstance(error, OSError) and error.errno in _NO_ROOM


def is_in_the_way(path: Path, *, overwrite: bool) -> bool:
    """Return whether something is at `path` that stays: a folder, or anything if `overwrite` is false."""
    return os.path.lexists(path) and (not overwrite or (path.is_dir() and not path.is_symlink()))


def _nothing(path: Path) -> bool:
    return False


@contextmanager
def _whole(paths: Sequence[Path], stays: Callable[[Path], bool], *, overwrite: bool) -> Iterator[list[Path]]:
    """Write files; if something is at one of their names that `stays`, all get other names."""
    temporaries: list[Path] = []
    with ExitStack() as held:
        try:
            temporaries.extend(held.enter_context(_temporary(path)) for path in paths)
            yield temporaries
            for temporary in temporaries:
                flush(temporary)
            for path in paths:
                if stays(path):
                    _keep_both(temporaries, paths, path)
            for number, (temporary, path) in enumerate(zip(temporaries, paths, strict=True)):
                if overwrite:
                    temporary.replace(path)
                elif not _put(temporary, path):
                    _keep_both([*paths[:number], *temporaries[number:]], paths, path)
            for folder in {path.parent for path in paths}:
                flush(folder)
        except OSError as error:
            if error.errno in _NO_ROOM:
                names = ", ".join(repr(str(path)) for path in paths)
                raise JobFailedError(f"cannot write {names}: {os.strerror(error.errno)}") from error
            raise


class PlainFile(io.FileIO):
    """An unbuffered file, which reports a failed write at once and remembers it.

    Attributes:
        error: the failure, for callers whose writer reports a less helpful one.
    """

    error: OSError | None = None

    def write(self, content: Any, /) -> int:
        left = memoryview(content).cast("B")
        size = left.nbytes
        try:
            while left:
                left = left[super().write(left) :]
        except OSError as error:
            self.error = error
            raise
        return size


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """Create an empty temporary file beside `path`, with default permissions; remove it if it is left over.

    The file is locked while the block runs, so that other processes can tell whether it is still being
    written, across containers and machines; its name tells only people.
    """
    remove_orphans(path)
    who = f"{socket.gethostname()}.{os.getpid()}"
    descriptor = None
    while descriptor is None:
        name = f".{shortened(path.stem)}.{who}.{secrets.token_hex(4)}.part{path.suffix}"
        descriptor = _claimed(temporary := path.with_name(name))
    try:
        yield temporary
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        os.close(descriptor)


def _claimed(temporary: Path) -> int | None:
    """Create a file and lock it; return its descriptor, or None if another process was faster."""
    try:
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
    except FileExistsError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        lost = not os.path.lexists(temporary)
    except BlockingIOError:
        lost = True
    except OSError:  # a file system without locks, where no process removes orphans
        lost = False
    if lost:  # another process took it for an orphan before it was locked, and is removing it
        os.close(descriptor)
        return None
    return descriptor


def shortened(name: str) -> str:
    """Shorten a long name to its beginning and a digest, so that a suffix can be appended."""
    encoded = name.encode(errors="surrogateescape")
    if len(encoded) <= _LONGEST:
        return name
    beginning = encoded[: _LONGEST - 20].decode(errors="ignore")
    return f"{beginning}-{hashlib.sha256(encoded).hexdigest()[:16]}"


def _put(temporary: Path, path: Path) -> bool:
    """Rename a file unless the name is taken; return whether it was free."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        if os.path.lexists(path):
            return False
        temporary.rename(path)
    return True


def _keep_both(temporaries: Sequence[Path], paths: Sequence[Path], taken: Path) -> NoReturn:
    """Rename files to numbered names that are free, as the name `taken` is another's.

    Raises:
        JobFailedError: always, with the names.
    """
    number = 2
    while any(os.path.lexists(_numbered(path, number)) for path in paths):
        number += 1
    for temporary, path in zip(temporaries, paths, strict=True):
        temporary.rename(_numbered(path, number))
    kept = ", ".join(repr(str(_numbered(path, number))) for path in paths)
    raise JobFailedError(
        f"{str(taken)!r} was created by another process meanwhile and was kept; this job's output is {kept}"
    )


def _numbered(path: Path, number: int) -> Path:
    return path.with_stem(f"{shortened(path.stem)}.{number}")


def remove_orphans(path: Path) -> None:
    """Remove temporary files of `path` that no process is writing any more."""
    stem, suffix = re.escape(f".{shortened(path.stem)}."), re.escape(f".part{path.suffix}")
    own = re.compile(rf"{stem}[^/]+\.\d+\.[0-9a-f]{{8}}{suffix}")
    with suppress(OSError):  # an unreadable folder: the write itself will report it
        for orphan in [found for found in path.parent.iterdir() if own.fullmatch(found.name)]:
            with suppress(OSError):  # another user's, locked, or on a file system without locks
                _remove_unlocked(orphan)


def _remove_unlocked(orphan: Path) -> None:
    descriptor = os.open(orphan, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if is_at(descriptor, orphan) and stat.S_ISREG(os.fstat(descriptor).st_mode):
            orphan.unlink()
    finally:
        os.close(descriptor)


def flush(path: Path) -> None:
    """Wait until a file, or a folder's list of entries, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
