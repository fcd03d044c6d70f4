"""Resuming: denoising that can be interrupted, checkpointed and resumed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from diffusers import SchedulerMixin

from runtime.checkpoint.folder import Checkpoints
from runtime.checkpoint.reader import Restored, restore
from runtime.checkpoint.writer import CheckpointWriter, Snapshot
from runtime.models.sampler import restore_sampler, sampler_state
from runtime.parallel.ranks import Ranks
from runtime.parallel.topology import Topology
from runtime.sampling.coordinator import Coordinator
from runtime.sampling.denoise import Denoising, StepRecord
from runtime.sampling.streams import Stream
from spectrum import StepKind

_PATIENCE = 60.0  # seconds that a failed job waits for its checkpoint to be written


@dataclass(slots=True)
class DenoisingState:
    """State of one rank's denoising, and its conversion to a checkpoint and back.

    Attributes:
        state: latents.
        sampler, stream, coordinator: the other parts, with state of their own.
        steps: records of this rank's steps, in order.
    """

    state: Denoising
    sampler: SchedulerMixin
    stream: Stream
    coordinator: Coordinator
    steps: list[StepRecord] = field(default_factory=list)

    def snapshot(self) -> Snapshot:
        """Snapshot of the state after the last step."""
        decided, sums = self.coordinator.state()
        shared = {
            "latents": self.state.latents_BCFHW,
            "sampler": sampler_state(self.sampler),
            "coordinator": decided,
            "stream": self.stream.whole(),
        }
        own = {"sums": sums, "steps": [_plain(step) for step in self.steps]}
        return Snapshot(self.steps[-1].index, shared, own, self.stream.history())

    def restore(self, found: Restored, ranks: Ranks) -> None:
        """Restore a checkpoint's state; on another topology, the first rank takes over all ranks' sums."""
        device = self.state.latents_BCFHW.device
        self.state.latents_BCFHW = found.shared["latents"].to(device)
        restore_sampler(self.sampler, found.shared["sampler"], device)
        self.stream.restore(found.history, found.shared["stream"], sharded=found.sharded)
        share = 1 if found.sharded or ranks.is_leader else 0
        self.coordinator.restore(found.shared["coordinator"], [one["sums"] for one in found.own], share)
        logs = [[_record(step) for step in one["steps"]] for one in found.own]
        for of_step in zip(*logs, strict=True):
            sent = share * sum(step.sent for step in of_step)
            self.steps.append(StepRecord(**asdict(of_step[0]) | {"sent": sent}))


class Resumable:
    """Writes checkpoints of `progress` and resumes from them; does nothing without `checkpoints`.

    Args:
        progress: state to save and restore.
        checkpoints: folder and options; None for no checkpoints.
        identity: recipe of the generation, as text; checkpoints of others are ignored.
        topology, ranks: arrangement of the ranks, and the ranks.
    """

    def __init__(
        self,
        progress: DenoisingState,
        checkpoints: Checkpoints | None,
        identity: str,
        topology: Topology,
        ranks: Ranks,
    ):
        self._progress, self._checkpoints, self._ranks = progress, checkpoints, ranks
        self._identity, self._topology = identity, topology
        self._writer: CheckpointWriter | None = None

    def begin(self) -> int:
        """Resume from the newest checkpoint if that is requested; return the first step left to do."""
        if self._checkpoints is None:
            return 0
        folder, found = self._checkpoints.of(self._identity), None
        if self._checkpoints.resume:
            found = restore(folder, self._topology, self._ranks, self._progress.stream.names)
        if found is not None:
            self._progress.restore(found, self._ranks)
        self._writer = CheckpointWriter(
            folder, self._identity, self._topology, self._ranks.rank, self._checkpoints.every
        )
        return 0 if found is None else found.step + 1

    def after(self, record: StepRecord) -> None:
        """Note that a step is done, and write a checkpoint if one is due."""
        if self._writer is None:
            return
        computed = record.kind is StepKind.COMPUTE
        if self._writer.due(computed) and self._writer.busy:
            self._ranks.at("waiting for its disk", busy=True)
        self._writer.offer(computed, self._progress.snapshot)

    def finish(self) -> int:
        """Write a last checkpoint and wait for it; return the bytes that this rank has written in all."""
        if self._writer is None:
            return 0
        if self._progress.steps:
            with self._ranks.busy("writing its last checkpoint"):
                self._writer.finish(self._progress.snapshot())
        return self._writer.bytes

    def abandon(self) -> None:
        """Wait a limited time for a running write, so that it ends before the folder is cleaned up."""
        if self._writer is not None and self._writer.busy:
            with self._ranks.busy("writing its last checkpoint"):
                self._writer.let_go(_PATIENCE)


def _plain(step: StepRecord) -> dict[str, Any]:
    return asdict(step) | {"kind": str(step.kind)}


def _record(step: dict[str, Any]) -> StepRecord:
    return StepRecord(**step | {"kind": StepKind(step["kind"])})
