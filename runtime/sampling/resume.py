"""One generation's denoising as something that can be interrupted and gone on with."""

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

_PATIENCE = 60.0  # seconds that a job which has failed waits for its disk


@dataclass(slots=True)
class Progress:
    """All that changes while one rank denoises, and how it is taken to disk and back.

    Attributes:
        steps: records of this rank, in order.
    """

    state: Denoising
    sampler: SchedulerMixin
    stream: Stream
    coordinator: Coordinator
    steps: list[StepRecord] = field(default_factory=list)

    def snapshot(self) -> Snapshot:
        """The state after the last step."""
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
        """Become what `found` was. The first rank takes over the sums of ranks that are no more."""
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
    """Takes `progress` to checkpoints as it goes; without `checkpoints` it does nothing.

    Args:
        identity: of the generation; checkpoints of another are not looked at.
    """

    def __init__(
        self,
        progress: Progress,
        checkpoints: Checkpoints | None,
        identity: str,
        topology: Topology,
        ranks: Ranks,
    ):
        self._progress, self._checkpoints, self._ranks = progress, checkpoints, ranks
        self._identity, self._topology = identity, topology
        self._writer: CheckpointWriter | None = None

    def begin(self) -> int:
        """Go on from the newest checkpoint if that is wanted; the first step that is left to do."""
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
        """A step is done."""
        if self._writer is None:
            return
        computed = record.kind is StepKind.COMPUTE
        if self._writer.due(computed) and self._writer.busy:
            self._ranks.at("waiting for its disk", busy=True)
        self._writer.offer(computed, self._progress.snapshot)

    def finish(self) -> int:
        """Keep where it is now, and wait until it is on disk; bytes that this rank has written in all."""
        if self._writer is None:
            return 0
        if self._progress.steps:
            with self._ranks.busy("writing its last checkpoint"):
                self._writer.finish(self._progress.snapshot())
        return self._writer.bytes

    def abandon(self) -> None:
        """Let what is being written end before anybody clears up, unless it takes long."""
        if self._writer is not None and self._writer.busy:
            with self._ranks.busy("writing its last checkpoint"):
                self._writer.let_go(_PATIENCE)


def _plain(step: StepRecord) -> dict[str, Any]:
    return asdict(step) | {"kind": str(step.kind)}


def _record(step: dict[str, Any]) -> StepRecord:
    return StepRecord(**step | {"kind": StepKind(step["kind"])})
