"""The folder of a film: locked by the process that makes it; no file or request of the user's is touched."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from launch.serve.entries import Entry, State
from launch.serve.queue import Queue
from runtime.errors import BadRequestError
from runtime.files.checks import check_folder as check_room
from runtime.files.checks import check_writable, refusing
from runtime.files.locks import hold
from runtime.files.text import read_json

FILM, PAGE, POSTER, SHEET, MANIFEST = (
    "film.mp4", "film.html", "poster.png", "contact-sheet.png", "manifest.json"
)  # fmt: skip
_OWN = (FILM, PAGE, POSTER, SHEET, MANIFEST)
QUEUE, OPEN = "queue", (State.WAITING, State.RUNNING)
_LOCK = "lockstep.lock"  # also marks the folder as a film's; never removed
_REQUEST = re.compile(r".+-[0-9a-f]{12}@[0-9]+")  # name of a shot's request; see `request_name`


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
            f"out: {str(out)!r} given; {', '.join(foreign)} in it would be replaced, "
            f"but Lockstep did not write {'it' if len(foreign) == 1 else 'them'}; give another folder"
        )


def check_out(out: Path) -> None:
    """Check the folder of a film as `held` does, without making it or anything in it.

    Raises:
        BadRequestError: see `check_folder` and `check_writable`.
    """
    check_folder(out)
    if os.path.lexists(out):
        _check_names(out)
        _check_queue(out)
    else:
        check_room(next(one for one in out.absolute().parents if os.path.lexists(one)), field="out")


def _check_names(out: Path) -> None:
    """Refuse a folder in which something is in the way of a film's files, before any shot is made."""
    for name in _OWN:
        check_writable(out / name, overwrite=True)
    shots = out / "shots"
    if os.path.lexists(shots) and not shots.is_dir():
        raise BadRequestError(f"out: {str(shots)!r} given; {os.strerror(errno.EEXIST)}")


def request_name(video: Path, attempt: int) -> str:
    """Name of the request for a shot, from the name of its mp4, `<id>-<digest>.mp4`."""
    return f"{video.stem}@{attempt}"


def is_shot(entry: Entry) -> bool:
    """Return whether a request of the folder's queue is for a shot, of this film or an earlier one."""
    return _REQUEST.fullmatch(entry.name) is not None


def _check_queue(out: Path) -> None:
    """Refuse a folder whose queue is the user's own: a film cancels requests that it no longer needs."""
    if not (out / QUEUE / "queue.sqlite").is_file():
        return
    with closing(Queue(out / QUEUE)) as queue:
        others = [entry.name for entry in queue.entries(*OPEN) if not is_shot(entry)]
    if others:
        raise BadRequestError(
            f"out: {str(out)!r} given; {str(out / QUEUE)!r} holds requests that are not shots of a film, "
            f"such as {others[0]!r}; give another folder"
        )


@contextmanager
def held(out: Path) -> Iterator[None]:
    """Create the folder with its subfolder for shots, and hold its lock.

    Raises:
        BadRequestError: another process makes a film in it; or its queue holds other requests; or see
            `check_folder` and `check_writable`.
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
        _check_queue(out)
        with refusing("out", out / "shots"):
            (out / "shots").mkdir(exist_ok=True)
        yield


def _is_ours(manifest: Path) -> bool:
    try:
        content = read_json(manifest)
        return content["schema"] == 1 and "lockstep" in content["versions"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
