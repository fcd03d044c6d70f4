"""The folder that a conversion makes: under another name until it is complete, so that it appears whole.

That other folder, beside the final one, keeps what an interrupted conversion has finished, with a journal.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.errors import BadRequestError
from runtime.files.atomic import flush, whole_file
from runtime.files.checks import check_folder, check_outlives, refusing
from runtime.files.locks import hold
from runtime.files.text import read_json

MANIFEST = "lockstep_conversion.json"
_JOURNAL, _LOCK = "unfinished.json", "lock"
_TEMPORARY = re.compile(r"\..+\.\d+\.[0-9a-f]{8}\.part(\.\w+)?")


@dataclass(frozen=True, slots=True)
class Target:
    """The folder of a conversion.

    Attributes:
        folder: the folder, an absolute path.
        identity: what the conversion is a function of, as JSON.
        sizes: each file that it makes, as a path in the folder → size in bytes.
    """

    folder: Path
    identity: Mapping[str, Any]
    sizes: Mapping[str, int]

    @property
    def partial(self) -> Path:
        """Folder in which it is made."""
        return self.folder.with_name(f".{self.folder.name}.converting")

    def is_done(self) -> bool:
        """Return whether the folder is there, complete, and of this conversion.

        Raises:
            BadRequestError: something else is there.
        """
        held = _held(self.folder)
        if held and _read(self.folder / MANIFEST).get("of") != self.identity:
            raise _not_empty(self.folder, held)
        return bool(held)

    def check(self) -> None:
        """Refuse a folder that cannot be made. Creates missing folders above it.

        Raises:
            BadRequestError: its place cannot be written to or has no room; or what is there is of another
                conversion, or not of one.
        """
        folder = self.folder
        check_outlives(folder, field="folder")
        check_folder(folder.parent, field="folder")
        with refusing("folder", folder):
            done = self.finished()
            missing = sum(size for name, size in self.sizes.items() if name not in done)
            free = shutil.disk_usage(folder.parent).free
        if missing > free:
            raise BadRequestError(
                f"folder: {str(folder)!r} given; {missing / 2**30:.1f} GiB are to be written, and "
                f"{free / 2**30:.1f} GiB are free there"
            )

    def finished(self) -> dict[str, str]:
        """Files that an interrupted conversion has finished → their SHA-256.

        Raises:
            BadRequestError: what is there is of another conversion, or not of one.
        """
        partial = self.partial
        held = [path.relative_to(partial) for path in partial.rglob("*") if not path.is_dir()]
        journal = _read(partial / _JOURNAL)
        own = {*self.sizes, _JOURNAL, _LOCK, MANIFEST} if journal else {_LOCK}
        strange = sorted(str(name) for name in held if str(name) not in own and not _is_temporary(name))
        others = bool(journal) and journal.get("of") != self.identity
        if strange or others:
            what = "an unfinished conversion of another model, or in another dtype" if others else strange[0]
            raise BadRequestError(
                f"folder: {str(self.folder)!r} given; it would be made in {partial}, which holds {what}; "
                "remove that folder, or give another name"
            )
        done: dict[str, str] = dict(journal.get("files", {}))
        return {name: digest for name, digest in done.items() if (partial / name).is_file()}

    @contextmanager
    def being_made(self) -> Iterator[None]:
        """Hold the folder for this process.

        Raises:
            BadRequestError: another process converts a model into it.
        """
        self.partial.mkdir(parents=True, exist_ok=True)
        with hold(self.partial / _LOCK, field="folder", said=self._said_held):
            yield

    def _said_held(self, who: str) -> str:
        return f"folder: {str(self.folder)!r} given; {who} is converting a model into it"

    def keep_account(self, finished: Mapping[str, str]) -> None:
        """Note which files are finished."""
        self.put(_JOURNAL, json.dumps({"of": self.identity, "files": finished}).encode())

    def put(self, name: str, content: bytes) -> None:
        """Write a small file, whole or not at all."""
        path = self.partial / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as temporary:
            temporary.write_bytes(content)

    def finish(self, finished: Mapping[str, str]) -> None:
        """Give the folder its final name.

        Raises:
            OSError: something has appeared there meanwhile.
        """
        manifest = {"schema": 1, "of": self.identity, "files": dict(sorted(finished.items()))}
        self.put(MANIFEST, json.dumps(manifest, indent=2).encode())
        for name in (_JOURNAL, _LOCK):
            (self.partial / name).unlink()
        _sweep(self.partial)
        self.partial.rename(self.folder)  # an empty folder may be there
        flush(self.folder.parent)


def check_new(folder: Path) -> None:
    """Refuse a folder that no conversion can make or has made, before the model is looked at.

    Raises:
        BadRequestError: something else is there, or a folder that holds something else.
    """
    held = _held(folder.absolute())
    if held and MANIFEST not in held:
        raise _not_empty(folder.absolute(), held)


def _held(folder: Path) -> list[str]:
    """Names of what a folder holds; none if it does not exist.

    Raises:
        BadRequestError: something other than a folder is there.
    """
    if not os.path.lexists(folder):
        return []
    if folder.is_symlink() or not folder.is_dir():
        raise BadRequestError(f"folder: {str(folder)!r} given; it is not a folder; give another name")
    with refusing("folder", folder):
        return sorted(entry.name for entry in folder.iterdir())


def _not_empty(folder: Path, held: list[str]) -> BadRequestError:
    return BadRequestError(
        f"folder: {str(folder)!r} given; it is not empty, it holds {held[0]!r}; give the name of a new folder"
    )


def _sweep(folder: Path) -> None:
    """Remove what killed processes left half-written, and wait until the folders are on disk."""
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir():
            flush(path)
        elif _is_temporary(path):
            path.unlink()


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except (OSError, ValueError):
        return {}


def _is_temporary(name: Path) -> bool:
    """Return whether a file is one of `whole_file` that is not whole."""
    return _TEMPORARY.fullmatch(name.name) is not None
