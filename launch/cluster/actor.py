"""One rank as a Ray actor, with the same engine inside as under torchrun."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Any

import psutil
import ray

from launch.cluster.metrics import RankMetrics
from launch.shell.exits import exit_code, give_up
from runtime.engine import Engine
from runtime.errors import NotFiniteError, in_words
from runtime.jobs.job import Job
from runtime.jobs.run import do_job
from runtime.media.preview import Previews
from runtime.parallel.devices import pick_device
from runtime.parallel.meeting import Rendezvous
from runtime.parallel.network import adopt
from runtime.parallel.ranks import join
from runtime.parallel.topology import Degrees
from runtime.parallel.watch import Watch
from runtime.reports.report import Report
from runtime.request.config import Config
from runtime.sampling.commands import Command
from runtime.sampling.denoise import OnStep, StepRecord
from spectrum import StepKind

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Begun:
    """One generation of a job has begun."""

    label: str
    kinds: Sequence[StepKind]


@dataclass(slots=True)
class Previewed:
    """Event: a preview of the running job.

    Attributes:
        content: an animated WebP; empty once there is a newer one.
    """

    content: bytes


Event = Begun | StepRecord | Previewed
"""Progress of a job, as the first rank reports it."""


class End(StrEnum):
    """Ways in which a job ends on a rank group."""

    DONE = "done"
    REFUSED = "refused"  # the request cannot be served; the group is fine
    CANCELLED = "cancelled"
    FAILED = "failed"  # the job failed and the group is lost
    HOPELESS = "failed for good"  # likewise, and any other group would fail in the same way


@dataclass(frozen=True, slots=True)
class Ended:
    """The end of a job, as a rank reports it.

    Attributes:
        reason: what went wrong.
        report: JSON of the report; on the first rank, when done.
    """

    end: End
    reason: str = ""
    report: str = ""


def _end_of(error: BaseException) -> End:
    if isinstance(error, NotFiniteError):
        return End.HOPELESS
    return {2: End.REFUSED, 130: End.CANCELLED}.get(exit_code(error), End.FAILED)


def _add_preview(events: list[Event], content: bytes) -> None:
    """Add a preview to the events of its job, even if it is late and another has begun; earlier ones are not
    needed any more."""
    for event in events:
        if isinstance(event, Previewed):
            event.content = b""
    events.append(Previewed(content))


@ray.remote(max_restarts=0, max_task_retries=0, concurrency_groups={"control": 1})
class RankActor:
    """One rank. Jobs run one after another; methods of the concurrency group `control` answer meanwhile."""

    def __init__(self) -> None:
        self._life = ExitStack()
        self._engine: Engine | None = None
        self._watch: Watch | None = None
        self._events: list[Event] = []
        self._job, self._stopped = -1, -1  # numbers of the current job, and of the last one told to stop

    @ray.method(concurrency_group="control")
    def place(self) -> tuple[str, str, int]:
        """Return this rank's node id, its address, and a free port there."""
        with closing(socket.socket()) as probe:
            probe.bind(("", 0))
            port = int(probe.getsockname()[1])
        return ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address(), port

    def start(
        self,
        rendezvous: Rendezvous,
        config: Config,
        degrees: Degrees,
        timeout: float,
        network: Mapping[str, str],
    ) -> dict[str, Any]:
        """Meet the other ranks and load the model, once for many jobs; returns where this rank runs.

        Args:
            network: variables of the driver that configure gloo and NCCL; those of this node count more.
        """
        adopt(network)
        self._metrics = RankMetrics(rendezvous.rank, config.model_name)
        device = pick_device(config.device, 0 if ray.get_gpu_ids() else rendezvous.local_rank)
        busy = config.busy_timeout
        joined = join(rendezvous, device, timeout=timeout, busy=busy, give_up=give_up)
        ranks = self._life.enter_context(joined)
        self._watch = ranks.watch
        self._engine = Engine(config, ranks, degrees)
        return {
            "rank": rendezvous.rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "born": psutil.Process().create_time(),
            "device": str(device),
        }

    def run(self, number: int, job: Job, *, previews: bool = False) -> Ended:
        """Do this rank's part of job `number` of the group; never raises.

        Args:
            previews: whether previews are to be among the first rank's events.
        """
        assert self._engine is not None
        self._events, self._job = [], number
        try:
            with self._previewed(previews):
                done = do_job(self._engine, job, self._show)
            self._metrics.kept(done.checkpoint_bytes)
            return Ended(End.DONE, report=done.to_json() if isinstance(done, Report) else "")
        except BaseException as error:
            end = _end_of(error)
            if end in (End.FAILED, End.HOPELESS):
                log.exception("rank %d: job failed", self._engine.ranks.rank)
                self._leave(error)
            return Ended(end, in_words(error))

    def _leave(self, error: BaseException) -> None:
        """Tell the other ranks, as leaving the `join` block that `start` entered would."""
        try:
            self._life.__exit__(type(error), error, error.__traceback__)
        except BaseException as again:
            log.info("left the group: %s", again)

    @contextmanager
    def _show(self, label: str, kinds: Sequence[StepKind]) -> Iterator[OnStep]:
        self._events.append(Begun(label, kinds))
        yield self._step

    @contextmanager
    def _previewed(self, wanted: bool) -> Iterator[None]:
        if not wanted or self._engine is None or not self._engine.ranks.is_leader:
            yield
            return
        with Previews(partial(_add_preview, self._events)) as previews, self._engine.previewed(previews):
            yield

    def _step(self, record: StepRecord) -> None:
        self._events.append(record)
        self._metrics.step(record)
        if self._stopped == self._job and self._engine is not None:
            self._engine.command(Command.STOP)

    @ray.method(concurrency_group="control")
    def events(self, number: int, start: int) -> list[Event]:
        """Return events of job `number` from index `start` on; none if it has not begun. A stuck process
        does not answer."""
        return self._events[start:] if number == self._job else []

    @ray.method(concurrency_group="control")
    def failure(self) -> str | None:
        """Return why waiting for other ranks is hopeless, even if the main thread is unaware; else None."""
        error = None if self._watch is None else self._watch.failure()
        return None if error is None else str(error)

    @ray.method(concurrency_group="control")
    def stop(self, number: int) -> None:
        """End job `number` after a step, the same on all ranks, with a checkpoint. A job that has not begun
        ends after its first step; one that has ended is not affected."""
        self._stopped = number
        if self._engine is not None and self._job == number:
            self._engine.command(Command.STOP)
