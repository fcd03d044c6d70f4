"""Checkpoints: a generation's state on disk, whole or not at all, so that it can go on where it was.

    <root>/lockstep.lock                            held by the job that uses the folder
    <root>/<digest>/identity.json                   what this generation is a function of, for people
    <root>/<digest>/part-<step>-<rank>.pt           what this rank had to add after this step
    <root>/<digest>/manifest-<step>-<rank>.json     what this rank needs to go on after this step

Nothing that is called otherwise is ever touched, whatever folder it is that a user names.
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
from typing import IO, Any

from runtime.errors import BadRequestError
from runtime.files.atomic import shortened
from runtime.files.checks import check_folder, check_outlives, reason, refusing
from runtime.files.locks import hold
from runtime.files.text import read_json
from runtime.parallel.topology import Topology
from runtime.recipe import differences, some_of

log = logging.getLogger(__name__)

VERSION = 4  # of what parts and manifests hold
_LOCK, IDENTITY = "lockstep.lock", "identity.json"
_MANIFEST = re.compile(r"manifest-(\d{5,})-\d+\.json")
_OWN = re.compile(r"(?:part-\d{5,}-\d+\.pt|manifest-\d{5,}-\d+\.json|identity\.json)")
_HALF = re.compile(r"\.(?:part-\d{5,}-\d+|manifest-\d{5,}-\d+|identity)\..+\.part\.(?:pt|json)")
_TRIES = 1000  # to hold a folder that others come to and leave meanwhile
_DIGEST = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """The checkpoints of one job, in a folder of their own.

    Attributes:
        root: made when it is needed; on several machines, on a disk that they share.
        every: a checkpoint after this many computed steps.
        resume: whether to go on from what is there.
        overwrite: whether what another job or request left there may be removed.
    """

    root: Path
    every: int = field(kw_only=True)
    resume: bool = field(kw_only=True, default=False)
    overwrite: bool = field(kw_only=True, default=False)

    @classmethod
    def folder_of(cls, out: Path, within: Path | None) -> Path:
        """The folder of the job that writes `out`: beside it, or `within` one that jobs may share."""
        if within is None:
            return out.with_suffix(".checkpoints")
        whole = hashlib.sha256(os.path.normpath(out.absolute()).encode(errors="surrogateescape")).hexdigest()
        return within / f"{shortened(out.stem)}-{whole[:8]}.checkpoints"

    def check(self) -> None:
        """Refuse a folder that cannot be used, or that holds another job's checkpoints.

        Raises:
            BadRequestError: see above; the message says what to do.
        """
        check_outlives(self.root, field="checkpoints")
        self._check_leave()
        if self.resume and self.newest is None:
            self._check_of_use()
            told = "there is no whole checkpoint" if self.left else "there is no checkpoint"
            log.warning("resume: %s in %r; starting at the first step", told, str(self.root))
        with refusing("checkpoints", self.root):
            missing = not self.root.exists()
        check_folder(self.root, field="checkpoints")
        if missing:  # made again when there is something to keep
            with suppress(OSError):
                self.root.rmdir()

    @contextmanager
    def locked(self, identities: Sequence[str] = ()) -> Iterator[None]:
        """Hold the folder for this process; what is not to be resumed is cleared first.

        Args:
            identities: of the job's generations, as JSON. There must be something of one of them to resume
                if there is anything.

        Raises:
            BadRequestError: another process holds it, or what is there is another job's or another request's.
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
        """Leave nothing of a job that is done; if another process holds the folder, it stays as it is."""
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
        """Remove all checkpoints; for the process that holds the folder.

        Raises:
            OSError: some could not be removed.
        """
        for folder in self._folders():
            _clear(folder)

    def of(self, identity: str) -> Path:
        """The folder of one generation."""
        return self.root / hashlib.sha256(identity.encode()).hexdigest()[:16]

    @property
    def newest(self) -> int | None:
        """The newest step that every rank has a checkpoint of."""
        return max((step for folder in self._folders() for step in complete_steps(folder)), default=None)

    @property
    def left(self) -> bool:
        """Whether a job that did not end has left something, whole or not: it stays until the user says what
        is to become of it. Whether it can be gone on from is what `newest` says."""
        return bool(self._manifests())

    def _manifests(self) -> list[Path]:
        return [
            folder / name
            for folder in self._folders()
            for name in _names(folder)
            if _MANIFEST.fullmatch(name)
        ]

    def _folders(self) -> list[Path]:
        """Folders of generations."""
        inside = [self.root / name for name in _names(self.root) if _DIGEST.fullmatch(name)]
        return [path for path in inside if path.is_dir() and not path.is_symlink()]

    def _check_leave(self) -> None:
        if self.left and not (self.resume or self.overwrite):
            none = "starts at the first step (none of them is whole)"
            does = none if self.newest is None else "goes on from them"
            raise BadRequestError(
                f"checkpoints: {str(self.root)!r} holds those of a job that did not end; --resume {does}, "
                "--overwrite starts again"
            )

    def _check_of_use(self) -> None:
        """Refuse, or if that is wanted remove, what nothing here can go on from, but others could: another
        version of Lockstep, or this one once the files can be read. What is damaged is of use to nobody."""
        told = "" if self.newest is not None else next(filter(None, map(_of_others, self._manifests())), "")
        if not told:
            return
        if self.overwrite:
            log.warning("checkpoints: %s; they are removed", told)
            self.discard()
            return
        raise BadRequestError(
            f"resume: {told}. The checkpoints are kept: resume with what can read them, give another --out, "
            "or start again with --overwrite instead of --resume"
        )

    def _check_identities(self, identities: Sequence[str]) -> None:
        """Refuse, or if that is wanted remove, what is of other generations than these alone."""
        kept = {folder: _identity_in(folder) for folder in self._folders()}
        known = {self.of(identity) for identity in identities}
        if not kept or known & kept.keys() or any(found in identities for found in kept.values()):
            return
        others = [json.loads(found) for found in kept.values() if found]
        differing = [differences(other, json.loads(one)) for other in others for one in identities]
        said = min(differing, key=len, default=["another version of Lockstep made them"])
        told = f"those in {str(self.root)!r} are of another request: {some_of(said)}"
        if self.overwrite:
            log.warning("checkpoints: %s; they are removed", told)
            self.discard()
            return
        raise BadRequestError(
            f"resume: the checkpoints do not fit, {told}. They are kept: resume with what they were made "
            "with, give another --out, or start again with --overwrite instead of --resume"
        )

    def _hold(self) -> IO[str]:
        """The open lock of the folder, which is made when it is missing."""
        for _ in range(_TRIES):
            try:
                self.root.mkdir(parents=True, exist_ok=True)
                return hold(
                    self.root / _LOCK,
                    field="checkpoints",
                    said=lambda who: f"checkpoints: another job is using {str(self.root)!r} ({who})",
                )
            except FileNotFoundError:
                continue  # who held it has just removed the folder
            except OSError as error:
                said = f"checkpoints: cannot write in {str(self.root)!r}: {reason(error)}"
                raise BadRequestError(said) from None
        raise BadRequestError(f"checkpoints: {str(self.root)!r} does not stay; choose another folder")

    def _leave(self) -> None:
        """Remove what the folder was used with; the folder, too, if nothing else is in it."""
        with suppress(OSError):
            (self.root / _LOCK).unlink(missing_ok=True)
            self.root.rmdir()


def complete_steps(folder: Path) -> list[int]:
    """Steps that every rank of the group that wrote them has a manifest of, the newest first."""
    found = (_MANIFEST.fullmatch(name) for name in _names(folder))
    steps = sorted({int(match[1]) for match in found if match}, reverse=True)
    return [step for step in steps if _is_complete(folder, step)]


def _is_complete(folder: Path, step: int) -> bool:
    try:
        topologies = [Topology(**read_manifest(folder, step, 0)["topology"])]
        topologies += [
            Topology(**read_manifest(folder, step, rank)["topology"])
            for rank in range(1, topologies[0].world)
        ]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return len(set(topologies)) == 1  # another group may have left manifests of the same step


def read_manifest(folder: Path, step: int, rank: int) -> dict[str, Any]:
    """What a rank needs to go on after a step.

    Raises:
        OSError, ValueError, KeyError, TypeError: there is none, or it is damaged or of another version.
    """
    manifest = read_json(folder / manifest_name(step, rank))
    if manifest["version"] != VERSION:
        raise ValueError(f"{folder} was written by another version of Lockstep")
    return manifest


def _of_others(manifest: Path) -> str:
    """Why a manifest is of no use here but may be elsewhere; empty if it is of use, damaged, or gone."""
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


def manifest_name(step: int, rank: int) -> str:
    """The name of a rank's manifest of a step."""
    return f"manifest-{step:05d}-{rank}.json"


def _names(folder: Path) -> list[str]:
    """What is in a folder that may not be there."""
    try:
        return sorted(path.name for path in folder.iterdir())
    except OSError:
        return []


def _clear(folder: Path) -> None:
    """Remove a generation's files, and the folder if nothing else is in it."""
    for path in folder.iterdir():
        if (_OWN.fullmatch(path.name) or _HALF.fullmatch(path.name)) and not path.is_dir():
            path.unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def identity_text(identity: str) -> str:
    """What `identity.json` holds.

    Args:
        identity: JSON, and in further lines which segments are before this one.
    """
    whole, *after = identity.splitlines()
    return json.dumps({"identity": json.loads(whole), "after": after}, indent=2) + "\n"


def _identity_in(folder: Path) -> str | None:
    """The identity of a generation without what is before it, as JSON; None if it is not known."""
    try:
        found = read_json(folder / IDENTITY)["identity"]
        return json.dumps(found, sort_keys=True) if isinstance(found, dict) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
