"""Resuming: denoising that can be interrupted, checkpointed and resumed."""

from __future__ import annotations

import secrets
from dataclasses import asdict
from functools import partial
from typing import Any

from runtime.checkpoint.folder import Checkpoints
from runtime.checkpoint.reader import Restored, restore
from runtime.checkpoint.writer import CheckpointWriter, Group, Snapshot
from runtime.models.sampler import restore_sampler, sampler_state
from runtime.parallel.ranks import Ranks
from runtime.parallel.topology import Topology, machine_name
from runtime.sampling.denoise import Denoising, StepRecord, summed
from spectrum import StepKind

_PATIENCE = 60.0  # seconds that a failed job waits for its checkpoint to be written


class Resumable:
    """Writes checkpoints of `state` and resumes from them; does nothing without `checkpoints`.

    Args:
        state: state to save and restore.
        checkpoints: folder and options; None for no checkpoints.
        identity: recipe of the generation, as text; checkpoints of others are ignored.
        topology, ranks: arrangement of the ranks, and the ranks.
    """

    def __init__(
        self,
        state: Denoising,
        checkpoints: Checkpoints | None,
        identity: str,
        topology: Topology,
        ranks: Ranks,
    ):
        self.state, self._checkpoints, self._ranks = state, checkpoints, ranks
        self._identity, self._topology = identity, topology
        self._writer: CheckpointWriter | None = None

    def begin(self) -> int:
        """Resume from the newest checkpoint if that is requested; return the first step left to do."""
        if self._checkpoints is None:
            return 0
        folder, found = self._checkpoints.of(self._identity), None
        if self._checkpoints.resume:
            restart = self._checkpoints.restart
            names = self.state.stream.names
            found = restore(folder, self._topology, self._ranks, names, restart=restart)
        if found is not None:
            _restore(self.state, found, self._ranks)
        ranks = self._ranks
        mark: str = ranks.control.all_gather_object(secrets.token_hex(4) if ranks.is_leader else "")[0]
        group = Group(mark, tuple(map(machine_name, ranks.hosts)))
        self._writer = CheckpointWriter(
            folder, self._identity, self._topology, ranks.rank, self._checkpoints.every, group
        )
        if not self._checkpoints.resume:
            return 0
        last = -1 if found is None else found.step
        self._writer.resume(last)
        return last + 1

    def after(self, record: StepRecord) -> None:
        """Note that a step is done, and write a checkpoint if one is due."""
        if self._writer is None:
            return
        computed = record.kind is StepKind.COMPUTE
        if self._writer.due(computed) and self._writer.busy:
            self._ranks.at("waiting for its disk", busy=True)
        self._writer.offer(computed, partial(_snapshot, self.state))

    def finish(self) -> int:
        """Write a last checkpoint and wait for it; return the bytes that this rank has written in all."""
        if self._writer is None:
            return 0
        if self.state.steps:
            with self._ranks.busy("writing its last checkpoint"):
                self._writer.finish(_snapshot(self.state))
        return self._writer.bytes

    def abandon(self) -> None:
        """Wait a limited time for a running write, so that it ends before the folder is cleaned up."""
        if self._writer is not None and self._writer.busy:
            with self._ranks.busy("writing its last checkpoint"):
                self._writer.let_go(_PATIENCE)


def _snapshot(state: Denoising) -> Snapshot:
    """Take a snapshot of the state after the last step."""
    decided, sums = state.coordinator.state()
    shared = {
        "latents": state.latents_BCFHW,
        "sampler": sampler_state(state.sampler),
        "coordinator": decided,
        "stream": state.stream.whole(),
    }
    own = {"sums": sums, "steps": [_plain(step) for step in state.steps]}
    return Snapshot(state.steps[-1].index, shared, own, state.stream.history())


def _restore(state: Denoising, found: Restored, ranks: Ranks) -> None:
    """Restore a checkpoint's state; on another topology, the first rank takes over all ranks' sums."""
    device = state.latents_BCFHW.device
    state.latents_BCFHW = found.shared["latents"].to(device)
    restore_sampler(state.sampler, found.shared["sampler"], device)
    state.stream.restore(found.history, found.shared["stream"], sharded=found.sharded)
    share = 1 if found.sharded or ranks.is_leader else 0
    state.coordinator.restore(found.shared["coordinator"], [one["sums"] for one in found.own], share)
    logs = [[_record(step) for step in one["steps"]] for one in found.own]
    for of_step in zip(*logs, strict=True):
        sent = summed(step.sent_by_axis for step in of_step) if share else {}
        own = {"sent": sum(sent.values()), "sent_by_axis": sent}
        state.steps.append(StepRecord(**asdict(of_step[0]) | own))


def _plain(step: StepRecord) -> dict[str, Any]:
    return asdict(step) | {"kind": str(step.kind)}


def _record(step: dict[str, Any]) -> StepRecord:
    return StepRecord(**step | {"kind": StepKind(step["kind"])})
