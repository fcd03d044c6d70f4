"""Checkpoints: a generation's state on disk, whole or not at all, from which it can be resumed.

    <root>/lockstep.lock                            held by the job that uses the folder
    <root>/<digest>/identity.json                   recipe of the generation, for people to read
    <root>/<digest>/part-<step>-<rank>.pt           this rank's new data after this step
    <root>/<digest>/manifest-<step>-<rank>.json     parts that this rank needs to resume after this step
    <root>/<digest>/fetched-<rank>/                 parts of other machines, while a job is resumed

On several machines, each has the files of its ranks; the disk may be shared, or not.
Files with other names are never touched, whichever folder a user names.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from runtime.checkpoint.manifests import MANIFEST, PART, VERSION, kept_steps, names_in
from runtime.errors import BadRequestError, reason, setting
from runtime.files.atomic import shortened
from runtime.files.checks import check_folder, check_outlives, refusing
from runtime.files.locks import hold
from runtime.files.text import read_json, without_parents
from runtime.recipe import differences, some_of

log = logging.getLogger(__name__)

_LOCK, IDENTITY = "lockstep.lock", "identity.json"
FETCHED = "fetched-"
_OWN = re.compile(rf"(?:{PART.pattern}|manifest-\d{{5,}}-\d+\.json|identity\.json)")
_HALF = re.compile(r"\.(?:part-\d{5,}-\d+|manifest-\d{5,}-\d+|identity)\..+\.part\.(?:pt|json)")
_FETCHED = re.compile(rf"{FETCHED}\d+")
_TRIES = 1000  # attempts to lock a folder that others create and remove meanwhile
_DIGEST = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """Checkpoints of one job, in a folder of their own.

    Attributes:
        root: the folder, created when needed; on several machines, each has its own unless they share a disk.
        every: number of computed steps from one checkpoint to the next.
        resume: whether to resume from existing checkpoints.
        restart: whether to start at the first step if a machine that has a part of them is not there;
            otherwise the job is refused.
        overwrite: whether checkpoints of another job or request may be removed.
    """

    root: Path
    every: int = field(kw_only=True)
    resume: bool = field(kw_only=True, default=False)
    restart: bool = field(kw_only=True, default=False)
    overwrite: bool = field(kw_only=True, default=False)

    @classmethod
    def folder_of(cls, out: Path, within: Path | None) -> Path:
        """Folder of the job that writes `out`: beside it, or in `within`, which jobs may share."""
        if within is None:
            return out.with_suffix(".checkpoints")
        whole = hashlib.sha256(os.fspath(without_parents(out)).encode(errors="surrogateescape")).hexdigest()
        return within / f"{shortened(out.stem)}-{whole[:8]}.checkpoints"

    def check(self) -> None:
        """Refuse a folder that cannot be used, or that holds another job's checkpoints.

        Raises:
            BadRequestError: the folder is refused; the message says what to do.
        """
        check_outlives(self.root, field="checkpoints")
        self._check_leave()
        if self.begins_anew:
            self._check_of_use()
        with refusing("checkpoints", self.root):
            missing = not self.root.exists()
        try:
            check_folder(self.root, field="checkpoints")
        finally:
            if missing:  # created again with the first checkpoint
                with suppress(OSError):
                    self.root.rmdir()

    @contextmanager
    def locked(self, identities: Sequence[str] = ()) -> Iterator[None]:
        """Lock the folder for this process; checkpoints that are not to be resumed are removed first.

        Args:
            identities: recipes of the job's generations, as JSON. If the folder holds checkpoints to resume
                from, one of them must match.

        Raises:
            BadRequestError: another process holds the folder, or another job or request left checkpoints.
        """
        lock = self._hold()
        try:
            self._check_leave()
            if not self.resume:
                with refusing("checkpoints", self.root):
                    self.discard()
            elif identities:
                self._check_identities(identities)
                self._check_of_use()
            yield
        finally:
            if not self.left:
                with suppress(OSError):
                    self.discard()
                self._leave()
            lock.close()

    def remove(self) -> None:
        """Remove everything of a finished job, unless another process holds the folder."""
        if not self.root.is_dir():
            return
        try:
            lock = self._hold()
        except BadRequestError:
            return
        with suppress(OSError):
            self.discard()
        self._leave()
        lock.close()

    def discard(self) -> None:
        """Remove all checkpoints; only for the process that holds the folder.

        Raises:
            OSError: a file could not be removed.
        """
        for folder in self._folders():
            _clear(folder)

    def of(self, identity: str) -> Path:
        """Folder of the generation with this identity."""
        return self.root / hashlib.sha256(identity.encode()).hexdigest()[:16]

    @property
    def newest(self) -> int | None:
        """Newest step of which every rank has a checkpoint; None if there is none that can be read.

        The files of ranks on other machines are taken to be there.
        """
        try:
            return max((step for folder in self._folders() for step in kept_steps(folder)), default=None)
        except OSError:
            return None

    @property
    def begins_anew(self) -> bool:
        """True if the job is to resume, and there is no complete checkpoint."""
        return self.resume and self.newest is None

    @property
    def left(self) -> bool:
        """True if an unfinished job left checkpoints, complete or not, or the folder cannot be read.

        They are kept until the user decides about them. `newest` says whether they can be resumed from.
        """
        try:
            return bool(self._manifests())
        except OSError:
            return True

    def _manifests(self) -> list[Path]:
        return [
            folder / name
            for folder in self._folders()
            for name in names_in(folder)
            if MANIFEST.fullmatch(name)
        ]

    def _folders(self) -> list[Path]:
        """List the folders of generations."""
        inside = [self.root / name for name in names_in(self.root) if _DIGEST.fullmatch(name)]
        return [path for path in inside if path.is_dir() and not path.is_symlink()]

    def _check_leave(self) -> None:
        with refusing("checkpoints", self.root):
            self._manifests()
        if self.left and not (self.resume or self.overwrite):
            none = "starts at the first step (none of them is complete)"
            does = none if self.newest is None else "resumes from them"
            raise BadRequestError(
                f"checkpoints: {str(self.root)!r} holds checkpoints of an unfinished job; "
                f"{setting('resume')} {does}, {setting('overwrite')} starts again"
            )

    def _check_of_use(self) -> None:
        """Refuse checkpoints that only another version can resume from, or that are unreadable now.

        With `overwrite` they are removed instead. Damaged ones, which nothing can read, are not refused.
        """
        told = "" if self.newest is not None else next(filter(None, map(_of_others, self._manifests())), "")
        if not told:
            return
        if self.overwrite:
            log.warning("checkpoints: %s; they are removed", told)
            self.discard()
            return
        raise BadRequestError(
            f"resume: {told}. The checkpoints are kept: resume where they can be read, give another name for "
            f"`out`, or start again with {setting('overwrite')} instead of `resume`"
        )

    def _check_identities(self, identities: Sequence[str]) -> None:
        """Refuse checkpoints if all of them belong to other requests; with `overwrite`, remove them."""
        kept = {folder: _identity_in(folder) for folder in self._folders()}
        known = {self.of(identity) for identity in identities}
        if not kept or known & kept.keys() or any(found in identities for found in kept.values()):
            return
        others = [json.loads(found) for found in kept.values() if found]
        differing = [differences(other, json.loads(one)) for other in others for one in identities]
        said = min(differing, key=len, default=["another version of Lockstep wrote them"])
        told = f"the ones in {str(self.root)!r} belong to another request: {some_of(said)}"
        if self.overwrite:
            log.warning("checkpoints: %s; they are removed", told)
            self.discard()
            return
        raise BadRequestError(
            f"resume: the checkpoints do not match: {told}. They are kept: resume with the request that they "
            f"were written for, give another name for `out`, or start again with {setting('overwrite')} "
            "instead of `resume`"
        )

    @property
    def mark(self) -> list[str | float]:
        """What tells the lock file from that of another disk; empty if there is none."""
        path = self.root / _LOCK
        try:
            return [path.read_text(encoding="utf-8"), float(int(path.stat().st_mtime))]
        except (OSError, UnicodeDecodeError):
            return []

    def _hold(self) -> IO[str]:
        """Lock the folder, which is created if it is missing, and return the open lock file."""
        for _ in range(_TRIES):
            try:
                self.root.mkdir(parents=True, exist_ok=True)
                return hold(
                    self.root / _LOCK,
                    field="checkpoints",
                    said=lambda who: f"checkpoints: another job is using {str(self.root)!r} ({who})",
                )
            except FileNotFoundError:
                continue  # the former holder has just removed the folder
            except OSError as error:
                said = f"checkpoints: cannot write in {str(self.root)!r}: {reason(error)}"
                raise BadRequestError(said) from None
        raise BadRequestError(
            f"checkpoints: {str(self.root)!r} is removed again and again; choose another folder"
        )

    def _leave(self) -> None:
        """Remove the lock file, and the folder if it is empty then."""
        with suppress(OSError):
            (self.root / _LOCK).unlink(missing_ok=True)
            self.root.rmdir()


def _of_others(manifest: Path) -> str:
    """Reason why a manifest cannot be used here but may be elsewhere; empty if usable, damaged or missing."""
    try:
        version = read_json(manifest)["version"]
    except FileNotFoundError:
        return ""
    except OSError as error:
        return f"cannot read {str(manifest)!r}: {reason(error)}"
    except (ValueError, KeyError, TypeError):
        return ""
    known = version == VERSION or not isinstance(version, int)
    return "" if known else f"{str(manifest)!r} was written by another version of Lockstep"


def _clear(folder: Path) -> None:
    """Remove a generation's files, and the folder if nothing else is in it."""
    for path in folder.iterdir():
        if _FETCHED.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            _clear(path)
        if (_OWN.fullmatch(path.name) or _HALF.fullmatch(path.name)) and not path.is_dir():
            path.unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def identity_text(identity: str) -> str:
    """Content of `identity.json`.

    Args:
        identity: a recipe as JSON, followed by lines that name the segments before this one.
    """
    whole, *after = identity.splitlines()
    return json.dumps({"identity": json.loads(whole), "after": after}, indent=2) + "\n"


def _identity_in(folder: Path) -> str | None:
    """Read the recipe of a generation, without earlier segments, as JSON; None if unknown."""
    try:
        found = read_json(folder / IDENTITY)["identity"]
        return json.dumps(found, sort_keys=True) if isinstance(found, dict) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
