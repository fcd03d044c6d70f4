"""The folder of a film: locked by the process that makes it, and no file of the user's is replaced."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from runtime.errors import BadRequestError
from runtime.files.checks import check_folder as check_room
from runtime.files.checks import check_writable, refusing
from runtime.files.locks import hold
from runtime.files.text import read_json

FILM, PAGE, POSTER, SHEET, MANIFEST = (
    "film.mp4", "film.html", "poster.png", "contact-sheet.png", "manifest.json"
)  # fmt: skip
_OWN = (FILM, PAGE, POSTER, SHEET, MANIFEST)
_LOCK = "lockstep.lock"  # also marks the folder as a film's; never removed


def own_files(out: Path) -> dict[Path, str]:
    """Files that a film has beside its shots → the option that names them."""
    return {out / name: "out" for name in _OWN}


def check_folder(out: Path) -> None:
    """Refuse a folder in which a film would replace files that are not Lockstep's.

    Raises:
        BadRequestError: the folder is not a film's and has files of the same names.
    """
    if (out / _LOCK).exists() or _is_ours(out / MANIFEST):
        return
    foreign = [name for name in _OWN if os.path.lexists(out / name)]
    if foreign:
        raise BadRequestError(
            f"out: {str(out)!r} given; {', '.join(foreign)} in it would be replaced and are not Lockstep's; "
            "give another folder"
        )


def check_out(out: Path) -> None:
    """Check the folder of a film as `held` does, without making it or anything in it.

    Raises:
        BadRequestError: see `check_folder` and `check_writable`.
    """
    check_folder(out)
    if os.path.lexists(out):
        _check_names(out)
    else:
        check_room(next(one for one in out.absolute().parents if os.path.lexists(one)), field="out")


def _check_names(out: Path) -> None:
    """Refuse a folder in which something is in the way of a film's files, before any shot is made."""
    for name in _OWN:
        check_writable(out / name, overwrite=True)
    shots = out / "shots"
    if os.path.lexists(shots) and not shots.is_dir():
        raise BadRequestError(f"out: {str(shots)!r} given; {os.strerror(errno.EEXIST)}")


@contextmanager
def held(out: Path) -> Iterator[None]:
    """Create the folder with its subfolder for shots, and hold its lock.

    Raises:
        BadRequestError: another process makes a film in it; or see `check_folder` and `check_writable`.
    """
    check_folder(out)
    _check_names(out)
    lock = hold(
        out / _LOCK,
        field="out",
        said=lambda who: (
            f"out: {str(out)!r} is in use: {who} makes a film in it; wait for it, or give another folder"
        ),
    )
    with lock:
        with refusing("out", out / "shots"):
            (out / "shots").mkdir(exist_ok=True)
        yield


def _is_ours(manifest: Path) -> bool:
    try:
        content = read_json(manifest)
        return content["schema"] == 1 and "lockstep" in content["versions"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
