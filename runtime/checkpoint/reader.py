"""Reading checkpoints: the newest that is complete on every rank, for the same topology or another.

Parts are mapped, and only the tensors that this rank needs are copied out of them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from runtime.checkpoint.folder import PART, complete_steps, read_manifest
from runtime.checkpoint.history import History
from runtime.checkpoint.writer import file_digest
from runtime.errors import reason
from runtime.files.tensors import each_tensor, map_tensors
from runtime.parallel.ranks import Ranks
from runtime.parallel.topology import Topology

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


def restore(folder: Path, topology: Topology, ranks: Ranks, branches: tuple[str, ...]) -> Restored | None:
    """Read the newest checkpoint in `folder` that is complete on every rank; None if there is none.

    Args:
        folder: folder of the generation.
        topology: topology that resumes. If it is the one that wrote, each rank reads its own part; otherwise
            the parts are concatenated.
        ranks: all ranks of the group.
        branches: branches that this rank computes.
    """
    found: list[int] = ranks.control.all_gather_object(complete_steps(folder) if ranks.is_leader else [])[0]
    for step in found:
        restored, problem = None, ""
        with ranks.busy("reading its checkpoint"):
            try:
                restored = _read(folder, step, topology, ranks.rank, branches)
            except Exception as error:  # torch and pickle raise anything for damaged files
                problem = reason(error)
        problems = [told for told in ranks.control.all_gather_object(problem) if told]
        if not problems:
            return restored
        if ranks.is_leader:
            log.warning("checkpoint of step %d: %s; trying the one before", step, problems[0])
    if found and ranks.is_leader:
        log.warning("no checkpoint in %r can be used; starting at the first step", str(folder))
    return None


def _read(folder: Path, step: int, topology: Topology, rank: int, branches: tuple[str, ...]) -> Restored:
    first = read_manifest(folder, step, 0)
    written = Topology(**first["topology"])
    same = written == topology
    manifests = [read_manifest(folder, step, r) for r in range(written.world)]
    parts = _Parts(folder)
    own = [parts.read(m, m["last"])["own"] for m in (manifests if not same else [manifests[rank]])]
    history: History = {}
    for branch in branches:
        holders = [rank] if same else _holders(written, branch)
        pieces = [parts.history(manifests[r], branch) for r in holders]
        steps = pieces[0] if pieces else {}
        history[branch] = {at: torch.cat([piece[at] for piece in pieces], dim=1) for at in steps}  # copies
    shared = each_tensor(parts.read(first, first["last"])["shared"], torch.Tensor.clone)
    return Restored(step, shared, own, history, same)


def _holders(topology: Topology, branch: str) -> list[int]:
    """Ranks that hold the shards of `branch`, possibly of one window, in the order of the tokens."""
    half = 1 if branch.rpartition("/")[2] == "uncond" and topology.cfg == 2 else 0
    places = {rank: topology.place(rank) for rank in range(topology.world)}
    return sorted((r for r, p in places.items() if p.cfg == half), key=lambda r: places[r].sequence)


class _Parts:
    """Parts of one folder, each verified and mapped once."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._read: dict[str, dict[str, Any]] = {}

    def read(self, manifest: Mapping[str, Any], name: str) -> dict[str, Any]:
        if not PART.fullmatch(name):
            raise ValueError(f"a manifest names {name!r}, which is not a part of a checkpoint")
        if name not in self._read:
            path = self._folder / name
            if file_digest(path) != manifest["parts"][name]:
                raise ValueError(f"{path} is damaged: its checksum differs from the manifest's")
            self._read[name] = map_tensors(path)
        return self._read[name]

    def history(self, manifest: Mapping[str, Any], branch: str) -> dict[int, torch.Tensor]:
        placed = manifest["history"].get(branch, {})
        return {int(at): self.read(manifest, part)["values"][branch][int(at)] for at, part in placed.items()}
