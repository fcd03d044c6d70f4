"""The folder of a film: one process at a time makes a film in it, and what is a user's is not replaced."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from runtime.errors import BadRequestError
from runtime.files.checks import check_writable, refusing
from runtime.files.locks import hold
from runtime.files.text import read_json

FILM, PAGE, POSTER, SHEET, MANIFEST = (
    "film.mp4", "film.html", "poster.png", "contact-sheet.png", "manifest.json"
)  # fmt: skip
_OWN = (FILM, PAGE, POSTER, SHEET, MANIFEST)
_LOCK = "lockstep.lock"  # also says that the folder is a film's; it stays


def own_files(out: Path) -> dict[Path, str]:
    """Files beside the shots that a film has, all named by `--out`."""
    return {out / name: "out" for name in _OWN}


def check_folder(out: Path) -> None:
    """Refuse a folder that has files of a film's names that no film has.

    Raises:
        BadRequestError: see above.
    """
    if (out / _LOCK).exists() or _is_ours(out / MANIFEST):
        return
    foreign = [name for name in _OWN if os.path.lexists(out / name)]
    if foreign:
        raise BadRequestError(
            f"out: {str(out)!r} given; {', '.join(foreign)} in it would be replaced and are not Lockstep's, "
            "give another folder"
        )


@contextmanager
def held(out: Path) -> Iterator[None]:
    """Hold the folder, which is made when it is missing and gets one for its shots, for this process.

    Raises:
        BadRequestError: another process makes a film in it, or see `check_folder` and `check_writable`.
    """
    check_folder(out)
    for name in _OWN:  # or one is found to be a folder when every shot is made
        check_writable(out / name, overwrite=True)
    lock = hold(
        out / _LOCK,
        field="out",
        said=lambda who: (
            f"out: {str(out)!r} is in use: {who} makes a film in it; wait for its end, or give another folder"
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
