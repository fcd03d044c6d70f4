"""Writing checkpoints: every rank writes its own part in the background, then a manifest that names the parts
needed to resume, with their checksums.

A checkpoint counts once every rank's manifest exists. Remembered features are written once, with the first
checkpoint after them; later manifests refer to that part again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from runtime.checkpoint.folder import IDENTITY, identity_text
from runtime.checkpoint.history import History
from runtime.checkpoint.manifests import VERSION, complete_steps, manifest_name
from runtime.errors import JobFailedError, named, reason, setting
from runtime.files.atomic import whole_file
from runtime.files.tensors import each_tensor, save_tensors
from runtime.files.text import read_json
from runtime.parallel.topology import Topology

_KEPT = 2  # checkpoints, so that there is another one if the newest is damaged
_LAG = 2  # newest checkpoints of one rank that others may not have written yet


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A rank's state after a step. Tensors in it are never written to again.

    Attributes:
        step: the last step that is done.
        shared: state that is the same on every rank (latents, sampler, decisions); the first rank's is kept.
        own: numbers of this rank alone, as JSON.
        history: values that its stream remembers.
    """

    step: int
    shared: dict[str, Any]
    own: dict[str, Any]
    history: History


@dataclass(frozen=True, slots=True)
class Group:
    """Ranks that write checkpoints together.

    Attributes:
        mark: tells them from other groups, whose manifests must not complete theirs.
        machines: name of every rank's machine; none if it does not matter.
    """

    mark: str = ""
    machines: tuple[str, ...] = ()

    def leads(self, rank: int) -> bool:
        """Return whether a rank is the first on its machine."""
        return self.machines.index(self.machines[rank]) == rank if self.machines else rank == 0


class CheckpointWriter:
    """Writes one rank's parts of one generation, in a thread of its own.

    Args:
        folder: folder of the generation.
        identity: recipe of the generation, as text; written beside the parts for people to read.
        topology, rank: arrangement of the ranks, and this rank.
        every: number of computed steps from one checkpoint to the next.
        group: the ranks that write together.
    """

    def __init__(
        self,
        folder: Path,
        identity: str,
        topology: Topology,
        rank: int,
        every: int,
        group: Group = Group(),
    ):
        self._folder, self._identity, self._group = folder, identity, group
        self._written: list[int] = []  # steps of this group's checkpoints, in order
        self._topology, self._rank, self._every = topology, rank, every
        self._computed, self._last = 0, -1
        self._parts: dict[str, str] = {}  # name → SHA-256
        self._where: dict[str, dict[int, str]] = {}  # branch → step → part
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self.bytes = 0

    def resume(self, step: int) -> None:
        """Go on after a restored checkpoint, which is not written again; call it once all ranks have read it.

        This rank's manifests of later steps, which an interrupted group left, are removed: another rank's new
        one could complete them, although the decisions may differ where they depend on the clock.

        Args:
            step: last step of that checkpoint; -1 if there was none that could be used.
        """
        self._last = step
        self._written = [step] if step >= 0 else []
        own = re.compile(rf"manifest-(\d{{5,}})-{self._rank}\.json")
        with contextlib.suppress(OSError):  # then it cannot be replaced, either, which `wait` tells
            found = [(own.fullmatch(path.name), path) for path in self._folder.iterdir()]
            for path in [path for match, path in found if match and int(match[1]) > step]:
                path.unlink()

    def offer(self, computed: bool, snapshot: Callable[[], Snapshot]) -> None:
        """Write a checkpoint in the background if one is due; called after every step.

        It waits only if the last one is not yet written: all ranks write after the same steps, even if one of
        their disks is slow.

        Raises:
            JobFailedError: an earlier checkpoint could not be written.
        """
        if self.due(computed):
            self.wait()
            self._begin(snapshot())
        self._computed += computed

    def due(self, computed: bool) -> bool:
        """Return whether a checkpoint is due after this step."""
        return computed and (self._computed + 1) % self._every == 0

    @property
    def busy(self) -> bool:
        """True while a checkpoint is being written."""
        return self._thread is not None and self._thread.is_alive()

    def finish(self, snapshot: Snapshot) -> None:
        """Write this snapshot, unless it was written or restored, and wait for it.

        Raises:
            JobFailedError: it could not be written.
        """
        self.wait()
        if snapshot.step != self._last:
            self._begin(snapshot)
        self.wait()

    def wait(self) -> None:
        """Wait for the checkpoint that is being written.

        Raises:
            JobFailedError: it could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            raise JobFailedError(
                f"checkpoints: cannot write in {str(self._folder)!r}: {_why(self._error)} "
                f"({setting('checkpoint_every', 0)} turns checkpoints off)"
            ) from self._error

    def let_go(self, within: float) -> None:
        """Wait at most `within` seconds for the checkpoint that is being written; ignore failures."""
        if self._thread is not None:
            self._thread.join(within)

    def _begin(self, snapshot: Snapshot) -> None:
        self._last = snapshot.step
        self._written.append(snapshot.step)
        self._thread = threading.Thread(target=self._write, args=(snapshot,), name="lockstep-checkpoint")
        self._thread.start()

    def _write(self, snapshot: Snapshot) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._write_part(snapshot)
            if self._group.leads(self._rank):
                self._write_identity()
            self._write_manifest(snapshot)
            self._prune()
        except Exception as error:  # raised by `wait`, in the main thread
            self._error = error

    def _write_part(self, snapshot: Snapshot) -> None:
        """Write the data that no earlier part holds."""
        name = f"part-{snapshot.step:05d}-{self._rank}.pt"
        new = {
            branch: {step: value.cpu() for step, value in values.items() if step not in self._steps(branch)}
            for branch, values in snapshot.history.items()
        }
        content = {"own": snapshot.own, "values": new}
        if self._rank == 0:
            content["shared"] = each_tensor(snapshot.shared, torch.Tensor.cpu)
        with whole_file(self._folder / name) as temporary:
            save_tensors(content, temporary)
            digest = file_digest(temporary)
            self.bytes += temporary.stat().st_size
        self._parts[name] = digest
        for branch, values in snapshot.history.items():
            placed = {step: self._steps(branch).get(step, name) for step in values}
            self._where[branch] = placed

    def _steps(self, branch: str) -> dict[int, str]:
        return self._where.get(branch, {})

    def _write_identity(self) -> None:
        path = self._folder / IDENTITY
        if not path.exists():
            with whole_file(path) as temporary:
                temporary.write_text(identity_text(self._identity), encoding="utf-8")

    def _write_manifest(self, snapshot: Snapshot) -> None:
        last = f"part-{snapshot.step:05d}-{self._rank}.pt"
        needed = {last, *(part for values in self._where.values() for part in values.values())}
        manifest = {
            "version": VERSION,
            "step": snapshot.step,
            "topology": asdict(self._topology),
            "group": self._group.mark,
            "machines": self._group.machines,
            "whole": self._whole(1),
            "last": last,
            "parts": {name: self._parts[name] for name in sorted(needed)},
            "history": {
                branch: {str(step): part for step, part in values.items()}
                for branch, values in self._where.items()
            },
        }
        with whole_file(self._folder / manifest_name(snapshot.step, self._rank)) as temporary:
            temporary.write_text(json.dumps(manifest), encoding="utf-8")

    def _whole(self, number: int) -> int:
        """Step of a checkpoint that all ranks have written, the newest of which this is certain or an earlier
        one; -1 if there is none.

        A rank that takes a step has waited for the checkpoint before its last one, and ranks take steps
        together. So when this rank writes one, all others have written the last but one.
        """
        place = len(self._written) - _LAG - number
        return self._written[place] if place >= 0 else -1

    def _prune(self) -> None:
        """Remove this rank's files that are older than the newest complete checkpoints.

        Files of other machines are not seen here unless the disk is shared.
        """
        newest = complete_steps(self._folder)[:_KEPT]
        kept = max(newest[-1] if len(newest) == _KEPT else -1, self._whole(_KEPT))
        oldest = manifest_name(kept, self._rank) if kept >= 0 else ""
        needed: set[str] = set()
        names = [path.name for path in self._folder.iterdir()]
        own = rf"-\d{{5,}}-{self._rank}"  # other names belong to other ranks
        for path in [self._folder / name for name in names if re.fullmatch(rf"manifest{own}\.json", name)]:
            if path.name < oldest:
                path.unlink()
                continue
            with contextlib.suppress(
                OSError, ValueError, KeyError, AttributeError
            ):  # a damaged one needs nothing
                needed |= read_json(path)["parts"].keys()
        for name in names:
            if re.fullmatch(rf"part{own}\.pt", name) and name not in needed:
                (self._folder / name).unlink()


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _why(error: Exception) -> str:
    """Describe an error in one line."""
    cause = error.__cause__ if isinstance(error, JobFailedError) else error
    return reason(cause) if isinstance(cause, OSError) else named(error)
