"""Checks of a user's paths: refuse those that cannot be written, would not last, or overwrite an input."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from runtime.errors import BadRequestError, reason, setting
from runtime.files.kinds import check_replaced
from runtime.files.text import without_parents

_PROBE = 4096  # bytes written to see whether there is room; quotas count, too
_PACKED = "runtime_resources"  # where Ray unpacks a job's working directory, and deletes it afterwards


@contextmanager
def refusing(field: str, path: Path | str) -> Iterator[None]:
    """Turn an error of the file system about a user's path into a refusal of `field`.

    Raises:
        BadRequestError: the block raised an `OSError`.
    """
    if "\0" in str(path):
        raise BadRequestError(f"{field}: {str(path)!r} given; a name cannot hold a null byte")
    try:
        yield
    except OSError as error:
        raise BadRequestError(f"{field}: {str(path)!r} given; {reason(error)}") from None


def check_writable(path: Path, *, overwrite: bool, field: str = "out", kind: str | None = None) -> None:
    """Refuse an output that cannot be written, before any work is done for it. Creates missing folders.

    Args:
        path: the file.
        overwrite: whether a file that exists may be replaced.
        field: option that names it.
        kind: the only kind of file that may be replaced, as `runtime.files.kinds` names it; None for any.

    Raises:
        BadRequestError: `path` is not a regular file; or it exists and `overwrite` is false, or is of another
            kind; or its folder cannot be written to, is full, or is deleted with a Ray job.
    """
    check_outlives(path, field=field)
    with refusing(field, path):
        mode = _mode(path)
    if path.name in ("", "..") or (mode is not None and stat.S_ISDIR(mode)):
        raise BadRequestError(f"{field}: {str(path)!r} given; it is a folder; give the name of a file")
    if mode is not None and not overwrite:
        raise BadRequestError(f"{field}: {str(path)!r} exists; give another name, or {setting('overwrite')}")
    if mode is not None and stat.S_ISLNK(mode):
        raise BadRequestError(
            f"{field}: {str(path)!r} given; it is a symbolic link; give the name of the file itself: "
            f"{os.path.realpath(path)!r}"  # which accepts circular links, too
        )
    if mode is not None and not stat.S_ISREG(mode):
        raise BadRequestError(f"{field}: {str(path)!r} given; it is not a regular file and is not replaced")
    if kind is not None and mode is not None:
        with refusing(field, path):
            check_replaced(path, kind, field)
    check_folder(path.parent, field=field)
    with refusing(field, path):
        _mode(path)  # the name may be too long for the folder, which may exist only now


def check_suffix(path: Path, *suffixes: str, field: str) -> None:
    """Refuse a name that ends in none of the suffixes.

    Raises:
        BadRequestError: it ends otherwise.
    """
    if path.suffix not in suffixes:
        raise BadRequestError(f"{field}: {str(path)!r} given; the name must end in {' or '.join(suffixes)}")


def _mode(path: Path) -> int | None:
    """Mode of the entry at `path`, links not followed; None if there is none."""
    try:
        return path.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None


def check_folder(folder: Path, *, field: str) -> None:
    """Refuse a folder in which files cannot be written. Creates it if it is missing.

    Raises:
        BadRequestError: it cannot be created or written to, or there is no room.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_PROBE))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise BadRequestError(f"{field}: cannot write in {str(folder)!r}: {reason(error)}") from None


def check_outlives(path: Path, *, field: str) -> None:
    """Refuse a path that is deleted with the working directory of a Ray job.

    Raises:
        BadRequestError: `path` is in it.
    """
    if _PACKED in without_parents(path).parts:
        raise BadRequestError(
            f"{field}: {str(path)!r} given; the job's working directory is deleted when it ends; "
            "give an absolute path on a disk that the nodes share"
        )


def check_apart(outputs: Mapping[Path, str], inputs: Mapping[Path, str]) -> None:
    """Refuse outputs that would replace an input, under any name and even with `--overwrite`.

    Args:
        outputs, inputs: path → the field that names it. An input may be a folder.

    Raises:
        BadRequestError: an output is an input, or a file in one.
    """
    for output, field in outputs.items():
        for given, other in inputs.items():
            if _is_in(output, given):
                raise BadRequestError(
                    f"{field}: {str(output)!r} given; it would replace {str(given)!r}, given for {other}: "
                    "give another name"
                )


def _is_in(output: Path, given: Path) -> bool:
    """Return whether the existing file `output` is `given`, or lies in it."""
    try:
        if not output.exists() or not given.exists():
            return False
        if given.is_dir():
            return output.resolve().is_relative_to(given.resolve())
        return output.samefile(given)
    except OSError:  # an unreadable path is refused where it is opened
        return False
