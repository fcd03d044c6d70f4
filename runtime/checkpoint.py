"""Checkpoints: a generation's state on disk, whole or not at all, so that it can go on where it was.

Every rank writes its own part in the background, then a manifest that names the parts a resume needs, with
their checksums. A checkpoint counts once every rank's manifest is there. Remembered features are written
once, with the first checkpoint after them; later manifests refer to that part again.

    <root>/<identity>/part-<step>-<rank>.pt         what this rank had to add after this step
    <root>/<identity>/manifest-<step>-<rank>.json   what this rank needs to go on after this step
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from runtime.errors import BadRequestError, JobFailedError
from runtime.files import whole_file
from runtime.ranks import Ranks
from runtime.streams import History
from runtime.topology import Topology

log = logging.getLogger(__name__)

_VERSION = 2
_KEPT = 2  # checkpoints: if the newest is damaged, there is one before it


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A rank's state after a step. Tensors in it are never written to again.

    Attributes:
        step: the last step that is done.
        shared: the same on every rank (latents, sampler, decisions); the first rank's is kept.
        own: numbers of this rank alone, as JSON.
        history: what its stream remembers.
    """

    step: int
    shared: dict[str, Any]
    own: dict[str, Any]
    history: History


@dataclass(frozen=True, slots=True)
class Restored:
    """A checkpoint as read.

    Attributes:
        sharded: whether the topology is the one that wrote it; `own` and `history` are then this rank's.
            Otherwise they are of all ranks: `own` one by one, `history` put together.
    """

    step: int
    shared: dict[str, Any]
    own: list[dict[str, Any]]
    history: History
    sharded: bool


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """The checkpoints of one job, in one folder.

    Attributes:
        root: made when it is needed; on several machines, on a disk that they share.
        every: a checkpoint after this many computed steps.
        resume: whether to go on from what is there.
    """

    root: Path
    every: int = field(kw_only=True)
    resume: bool = field(kw_only=True, default=False)

    def check(self, *, overwrite: bool) -> None:
        """Refuse a folder that cannot be used, or that holds another run's checkpoints.

        Raises:
            BadRequestError: see above; the message says what to do.
        """
        if self._unfinished and not (self.resume or overwrite):
            raise BadRequestError(
                f"checkpoints: {str(self.root)!r} holds those of a job that did not end; --resume goes on "
                "from them, --overwrite starts again"
            )
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with whole_file(self.root / "writable") as temporary:
                temporary.write_bytes(b"")
            (self.root / "writable").unlink()
            if not any(self.root.iterdir()):
                self.root.rmdir()  # made again when there is something to keep
        except OSError as error:
            raise BadRequestError(
                f"checkpoints: cannot write in {str(self.root)!r}: {error.strerror}"
            ) from None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process; what is not to be resumed is cleared first.

        Raises:
            BadRequestError: another process holds it.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / "lock").open("a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                lock.seek(0)
                raise BadRequestError(
                    f"checkpoints: another job is using {str(self.root)!r} ({lock.read().strip()})"
                ) from None
            lock.truncate(0)
            lock.write(f"process {os.getpid()}\n")
            lock.flush()
            if not self.resume:
                for folder in self.root.iterdir():
                    if folder.is_dir():
                        shutil.rmtree(folder)
            try:
                yield
            finally:
                if not self._unfinished:
                    self.remove()

    @property
    def _unfinished(self) -> bool:
        """Whether there is something to go on from."""
        return self.root.is_dir() and any(self.root.glob("*/manifest-*.json"))

    def remove(self) -> None:
        """The job is done; leave nothing."""
        shutil.rmtree(self.root, ignore_errors=True)

    def of(self, identity: str) -> Path:
        """The folder of one generation."""
        return self.root / hashlib.sha256(identity.encode()).hexdigest()[:16]


class CheckpointWriter:
    """Writes one rank's parts of one generation, in a thread of its own.

    Args:
        folder: of the generation.
        topology, rank: which part this is.
        every: a checkpoint after this many computed steps.
    """

    def __init__(self, folder: Path, topology: Topology, rank: int, every: int):
        self._folder, self._topology, self._rank, self._every = folder, topology, rank, every
        self._computed, self._last = 0, -1
        self._parts: dict[str, str] = {}  # name → SHA-256
        self._where: dict[str, dict[int, str]] = {}  # branch → step → part
        self._thread: threading.Thread | None = None
        self._error: OSError | RuntimeError | None = None
        self.bytes = 0

    def offer(self, computed: bool, snapshot: Callable[[], Snapshot]) -> None:
        """After every step: write in the background, if one is due. Waits only where the last is not written
        yet: all ranks write after the same steps, however slow one of their disks is.

        Raises:
            JobFailedError: an earlier one could not be written.
        """
        if self.due(computed):
            self.wait()
            self._begin(snapshot())
        self._computed += computed

    def due(self, computed: bool) -> bool:
        """Whether there is something to write after this step."""
        return computed and (self._computed + 1) % self._every == 0

    @property
    def busy(self) -> bool:
        """Whether it is still writing."""
        return self._thread is not None and self._thread.is_alive()

    def finish(self, snapshot: Snapshot) -> None:
        """Write this one, unless it is there already, and wait until it is.

        Raises:
            JobFailedError: it could not be written.
        """
        self.wait()
        if snapshot.step != self._last:
            self._begin(snapshot)
        self.wait()

    def wait(self) -> None:
        """Wait for what is being written.

        Raises:
            JobFailedError: it could not be.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            reason = getattr(self._error, "strerror", None) or str(self._error)
            raise JobFailedError(f"checkpoints: cannot write in {str(self._folder)!r}: {reason}")

    def _begin(self, snapshot: Snapshot) -> None:
        self._last = snapshot.step
        self._thread = threading.Thread(target=self._write, args=(snapshot,), name="lockstep-checkpoint")
        self._thread.start()

    def _write(self, snapshot: Snapshot) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._write_part(snapshot)
            self._write_manifest(snapshot)
            self._prune()
        except (OSError, RuntimeError) as error:  # torch reports a full disk as the latter
            self._error = error

    def _write_part(self, snapshot: Snapshot) -> None:
        """What no earlier part has."""
        name = f"part-{snapshot.step:05d}-{self._rank}.pt"
        new = {
            branch: {step: value.cpu() for step, value in values.items() if step not in self._steps(branch)}
            for branch, values in snapshot.history.items()
        }
        content = {"own": snapshot.own, "values": new}
        if self._rank == 0:
            content["shared"] = _on_cpu(snapshot.shared)
        with whole_file(self._folder / name) as temporary:
            torch.save(content, temporary)
            digest = _digest(temporary)
            self.bytes += temporary.stat().st_size
        self._parts[name] = digest
        for branch, values in snapshot.history.items():
            placed = {step: self._steps(branch).get(step, name) for step in values}
            self._where[branch] = placed

    def _steps(self, branch: str) -> dict[int, str]:
        return self._where.get(branch, {})

    def _write_manifest(self, snapshot: Snapshot) -> None:
        last = f"part-{snapshot.step:05d}-{self._rank}.pt"
        needed = {last, *(part for values in self._where.values() for part in values.values())}
        manifest = {
            "version": _VERSION,
            "step": snapshot.step,
            "topology": asdict(self._topology),
            "last": last,
            "parts": {name: self._parts[name] for name in sorted(needed)},
            "history": {
                branch: {str(step): part for step, part in values.items()}
                for branch, values in self._where.items()
            },
        }
        with whole_file(self._folder / _manifest_name(snapshot.step, self._rank)) as temporary:
            temporary.write_text(json.dumps(manifest), encoding="utf-8")

    def _prune(self) -> None:
        """Remove this rank's files that are older than the newest checkpoints that all ranks have."""
        newest = _complete_steps(self._folder)[:_KEPT]
        oldest = _manifest_name(newest[-1], self._rank) if len(newest) == _KEPT else ""
        needed: set[str] = set()
        for path in self._folder.glob(f"manifest-*-{self._rank}.json"):
            if path.name < oldest:
                path.unlink()
                continue
            with contextlib.suppress(ValueError, KeyError):  # a damaged one needs nothing
                needed |= json.loads(path.read_text(encoding="utf-8"))["parts"].keys()
        for path in self._folder.glob(f"part-*-{self._rank}.pt"):
            if path.name not in needed:
                path.unlink()


def restore(folder: Path, topology: Topology, ranks: Ranks, branches: tuple[str, ...]) -> Restored | None:
    """Read the newest checkpoint in `folder` that is whole on every rank; None if there is none.

    Args:
        topology: of the ranks that go on. If it is the one that wrote, each rank reads its own part;
            otherwise the parts are put together.
        branches: those that this rank computes.
    """
    found: list[int] = ranks.control.tell(_complete_steps(folder) if ranks.leads else [])[0]
    for step in found:
        restored, problem = None, ""
        try:
            restored = _read(folder, step, topology, ranks.rank, branches)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            problem = str(error).splitlines()[0] if str(error) else type(error).__name__
        problems = [told for told in ranks.control.tell(problem) if told]
        if not problems:
            return restored
        if ranks.leads:
            log.warning("checkpoint of step %d: %s; trying the one before", step, problems[0])
    return None


def _complete_steps(folder: Path) -> list[int]:
    """Steps whose manifests are there from every rank that wrote, the newest first."""
    steps = []
    for path in folder.glob("manifest-*-0.json"):
        step = int(path.name.split("-")[1])
        try:
            world = Topology(**_read_manifest(folder, step, 0)["topology"]).world
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if all((folder / _manifest_name(step, rank)).is_file() for rank in range(world)):
            steps.append(step)
    return sorted(steps, reverse=True)


def _read(folder: Path, step: int, topology: Topology, rank: int, branches: tuple[str, ...]) -> Restored:
    first = _read_manifest(folder, step, 0)
    written = Topology(**first["topology"])
    same = written == topology
    manifests = [_read_manifest(folder, step, r) for r in range(written.world)]
    parts = _Parts(folder)
    own = [parts.read(m, m["last"])["own"] for m in (manifests if not same else [manifests[rank]])]
    history: History = {}
    for branch in branches:
        holders = [rank] if same else _holders(written, branch)
        pieces = [parts.history(manifests[r], branch) for r in holders]
        history[branch] = {
            at: torch.cat([piece[at] for piece in pieces], dim=1) if len(pieces) > 1 else pieces[0][at]
            for at in (pieces[0] if pieces else {})
        }
    return Restored(step, parts.read(first, first["last"])["shared"], own, history, same)


def _holders(topology: Topology, branch: str) -> list[int]:
    """Ranks that hold the shards of `branch`, which may be one window's, in the order of the tokens."""
    half = 1 if branch.rpartition("/")[2] == "uncond" and topology.cfg == 2 else 0
    places = {rank: topology.place(rank) for rank in range(topology.world)}
    return sorted((r for r, p in places.items() if p.cfg == half), key=lambda r: places[r].sequence)


class _Parts:
    """Parts of one folder, each verified and read once."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._read: dict[str, dict[str, Any]] = {}

    def read(self, manifest: Mapping[str, Any], name: str) -> dict[str, Any]:
        if name not in self._read:
            path = self._folder / name
            if _digest(path) != manifest["parts"][name]:
                raise ValueError(f"{path} is damaged: its checksum is not the manifest's")
            self._read[name] = torch.load(path, weights_only=True)
        return self._read[name]

    def history(self, manifest: Mapping[str, Any], branch: str) -> dict[int, torch.Tensor]:
        placed = manifest["history"].get(branch, {})
        return {int(at): self.read(manifest, part)["values"][branch][int(at)] for at, part in placed.items()}


def _read_manifest(folder: Path, step: int, rank: int) -> dict[str, Any]:
    manifest = json.loads((folder / _manifest_name(step, rank)).read_text(encoding="utf-8"))
    if manifest["version"] != _VERSION:
        raise ValueError(f"{folder} was written by another version of Lockstep")
    return dict(manifest)


def _manifest_name(step: int, rank: int) -> str:
    return f"manifest-{step:05d}-{rank}.json"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _on_cpu(content: Any) -> Any:
    """The same nest of dicts, lists and values, with its tensors on the CPU."""
    if isinstance(content, torch.Tensor):
        return content.cpu()
    if isinstance(content, dict):
        return {key: _on_cpu(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_on_cpu(value) for value in content]
    return content
