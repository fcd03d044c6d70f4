"""Reading checkpoints: the newest that is complete on every rank, for the same topology or another.

Parts are mapped, and only the tensors that this rank needs are copied out of them.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from runtime.checkpoint.handover import Known, Manifests, fetch, gather_manifests, survey
from runtime.checkpoint.history import History
from runtime.checkpoint.manifests import PART
from runtime.checkpoint.writer import file_digest
from runtime.errors import BadRequestError, LockstepError, reason, setting
from runtime.files.tensors import each_tensor, map_tensors
from runtime.parallel.ranks import Ranks
from runtime.parallel.topology import Topology, machine_name

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Restored:
    """A checkpoint that was read.

    Attributes:
        step: the last step that is done.
        shared: state that is the same on every rank.
        own: state of single ranks.
        history: remembered values.
        sharded: whether the topology is the one that wrote it; `own` and `history` are then this rank's.
            Otherwise they cover all ranks: `own` one by one, `history` concatenated.
    """

    step: int
    shared: dict[str, Any]
    own: list[dict[str, Any]]
    history: History
    sharded: bool


def restore(
    folder: Path, topology: Topology, ranks: Ranks, branches: tuple[str, ...], *, restart: bool = False
) -> Restored | None:
    """Read the newest checkpoint that is complete on every rank; None if there is none.

    Parts that another machine has are fetched from there.

    Args:
        folder: folder of the generation, on every machine.
        topology: topology that resumes. If it is the one that wrote, each rank reads its own part; otherwise
            the parts are concatenated.
        ranks: all ranks of the group.
        branches: branches that this rank computes.
        restart: whether checkpoints are given up of which a machine that is not there has a part.

    Raises:
        BadRequestError: such a part is needed, or a machine cannot write what others send; raised on every
            rank.
    """
    found = survey(folder, ranks)
    for known in found:
        if known.missing:
            continue
        restored, problem = _read_together(folder, known, topology, ranks, branches)
        if not problem:
            return restored
        if ranks.is_leader:
            log.warning("checkpoint of step %d: %s; trying the one before", known.step, problem)
    machines = [machine_name(host) for host in ranks.hosts]
    lost = next(filter(None, (known.why_missing(machines) for known in found)), "")
    if lost and not restart:
        raise BadRequestError(
            f"resume: {lost} (this job has {', '.join(dict.fromkeys(machines))}). Start on the machines that "
            f"have the parts, copy {str(folder)!r} from there to a machine of this job, or start again with "
            f"{setting('overwrite')} instead of `resume`"
        )
    if found and ranks.is_leader:
        why = f": {lost}" if lost else ""
        log.warning("no checkpoint in %r can be used%s; starting at the first step", str(folder), why)
    return None


def _read_together(
    folder: Path, known: Known, topology: Topology, ranks: Ranks, branches: tuple[str, ...]
) -> tuple[Restored | None, str]:
    """Read one checkpoint on all ranks; what went wrong on the first that could not, empty if nothing did."""
    restored, fetched, problem = None, None, ""
    with ranks.busy("reading its checkpoint"):
        try:
            manifests = gather_manifests(folder, known, ranks)
            needed = _needed_here(manifests, known.topology == topology, ranks)
            fetched = fetch(folder, needed, ranks) if ranks.several_machines else None
            restored = _read(folder, fetched, manifests, topology, ranks.rank, branches)
        except LockstepError:  # of all ranks
            raise
        except Exception as error:  # torch and pickle raise anything for damaged files
            problem = reason(error)
    problems = [told for told in ranks.control.all_gather_object(problem) if told]
    if fetched is not None and ranks.leads_machine:
        shutil.rmtree(fetched, ignore_errors=True)
    return restored, next(iter(problems), "")


def _needed_here(manifests: Manifests, same: bool, ranks: Ranks) -> dict[str, str]:
    """Parts that the ranks of this machine read → SHA-256."""
    own = [rank for rank, host in enumerate(ranks.hosts) if host == ranks.hosts[ranks.rank]]
    needed = {manifests[0]["last"]: manifests[0]["parts"][manifests[0]["last"]]}
    for rank in own if same else manifests:
        needed |= manifests[rank]["parts"]
    return needed


def _read(
    folder: Path,
    fetched: Path | None,
    manifests: Manifests,
    topology: Topology,
    rank: int,
    branches: tuple[str, ...],
) -> Restored:
    first = manifests[0]
    written = Topology(**first["topology"])
    same = written == topology
    parts = _Parts(folder, fetched)
    writers = [rank] if same else range(written.world)
    own = [parts.read(manifests[r], manifests[r]["last"])["own"] for r in writers]
    history: History = {}
    for branch in branches:
        holders = [rank] if same else _holders(written, branch)
        pieces = [parts.history(manifests[r], branch) for r in holders]
        steps = pieces[0] if pieces else {}
        history[branch] = {at: torch.cat([piece[at] for piece in pieces], dim=1) for at in steps}  # copies
    shared = each_tensor(parts.read(first, first["last"])["shared"], torch.Tensor.clone)
    return Restored(first["step"], shared, own, history, same)


def _holders(topology: Topology, branch: str) -> list[int]:
    """Ranks that hold the shards of `branch`, possibly of one window, in the order of the tokens."""
    half = 1 if branch.rpartition("/")[2] == "uncond" and topology.cfg == 2 else 0
    places = {rank: topology.place(rank) for rank in range(topology.world)}
    return sorted((r for r, p in places.items() if p.cfg == half), key=lambda r: places[r].sequence)


class _Parts:
    """Parts of one folder, or of the one to which they were fetched, each verified and mapped once."""

    def __init__(self, folder: Path, fetched: Path | None):
        self._folder, self._fetched = folder, fetched
        self._read: dict[str, dict[str, Any]] = {}

    def read(self, manifest: Mapping[str, Any], name: str) -> dict[str, Any]:
        if not PART.fullmatch(name):
            raise ValueError(f"a manifest names {name!r}, which is not a part of a checkpoint")
        if name not in self._read:
            path = self._folder / name
            if self._fetched is not None and (self._fetched / name).exists():
                path = self._fetched / name
            if file_digest(path) != manifest["parts"][name]:
                raise ValueError(f"{path} is damaged: its checksum differs from the manifest's")
            self._read[name] = map_tensors(path)
        return self._read[name]

    def history(self, manifest: Mapping[str, Any], branch: str) -> dict[int, torch.Tensor]:
        placed = manifest["history"].get(branch, {})
        return {int(at): self.read(manifest, part)["values"][branch][int(at)] for at, part in placed.items()}
