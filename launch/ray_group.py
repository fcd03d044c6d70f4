"""A rank group on Ray: one placement group, one actor per rank, the same engine inside as under torchrun."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import psutil
import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from launch.exits import exit_code
from launch.jobs import Job
from launch.metrics import RankMetrics
from launch.run import do_job
from runtime.commands import Command
from runtime.configs import Config
from runtime.denoise import StepRecord
from runtime.devices import pick_device
from runtime.engine import Engine
from runtime.errors import BadRequestError, JobFailedError, LockstepError
from runtime.job import OnStep
from runtime.ranks import Rendezvous, join
from runtime.report import Report
from runtime.topology import Degrees
from spectrum import StepKind

log = logging.getLogger(__name__)

_POLL = 0.2  # seconds between two looks at a running job
_ANSWER = 5.0  # seconds that the first rank has to answer one of them
_SILENCE = 10.0  # seconds beyond two timeouts, after which a group that does not answer is given up
_ROOM = 120.0  # seconds to wait for a cluster to make room


class NoRoomError(JobFailedError):
    """The cluster is large enough, but others use it."""


@dataclass(frozen=True, slots=True)
class Begun:
    """One generation of a job has begun."""

    label: str
    kinds: Sequence[StepKind]


Event = Begun | StepRecord
"""What the first rank tells of its progress."""


class End(StrEnum):
    """How a job ended on a group."""

    DONE = "done"
    REFUSED = "refused"  # the request cannot be served; the group is well
    CANCELLED = "cancelled"
    FAILED = "failed"  # the job failed, the group is no more


@dataclass(frozen=True, slots=True)
class Ended:
    """The end of a job, as a rank tells it.

    Attributes:
        reason: what went wrong.
        report: the report's JSON; of the first rank, when done.
    """

    end: End
    reason: str = ""
    report: str = ""


@ray.remote(max_restarts=0, max_task_retries=0, concurrency_groups={"control": 1})
class RankActor:
    """One rank. Jobs run one after another; the methods of the group `control` answer meanwhile."""

    def __init__(self) -> None:
        self._life = ExitStack()
        self._engine: Engine | None = None
        self._events: list[Event] = []
        self._job, self._stopped = -1, -1  # numbers of the current job, and of the last that was told to stop

    @ray.method(concurrency_group="control")
    def place(self) -> tuple[str, str, int]:
        """This rank's node, its address, and a port that is free there."""
        with closing(socket.socket()) as probe:
            probe.bind(("", 0))
            port = int(probe.getsockname()[1])
        return ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address(), port

    def start(
        self, rendezvous: Rendezvous, config: Config, degrees: Degrees, timeout: float
    ) -> dict[str, Any]:
        """Meet the other ranks and load the model, once for many jobs; says where this rank is."""
        self._metrics = RankMetrics(rendezvous.rank, config.model)
        device = pick_device(config.device, 0 if ray.get_gpu_ids() else rendezvous.local_rank)
        ranks = self._life.enter_context(join(rendezvous, device, timeout=timeout))
        self._engine = Engine(config, ranks, degrees)
        return {
            "rank": rendezvous.rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "born": psutil.Process().create_time(),
            "device": str(device),
        }

    def run(self, number: int, job: Job) -> Ended:
        """Do this rank's part of the group's job of this number; never raises."""
        assert self._engine is not None
        self._events, self._job = [], number
        try:
            done = do_job(self._engine, job, self._show)
            self._metrics.kept(done.checkpoint_bytes)
            return Ended(End.DONE, report=done.to_json() if isinstance(done, Report) else "")
        except BaseException as error:
            end = {2: End.REFUSED, 130: End.CANCELLED}.get(exit_code(error), End.FAILED)
            if end is End.FAILED:
                log.exception("rank %d: job failed", self._engine.ranks.rank)
                self._leave(error)
            reason = str(error) if isinstance(error, LockstepError) else repr(error)
            return Ended(end, reason)

    def _leave(self, error: BaseException) -> None:
        """Tell the other ranks, as the end of the block that `start` opened would."""
        try:
            self._life.__exit__(type(error), error, error.__traceback__)
        except BaseException as again:
            log.info("left the group: %s", again)

    @contextmanager
    def _show(self, label: str, kinds: Sequence[StepKind]) -> Iterator[OnStep]:
        self._events.append(Begun(label, kinds))
        yield self._step

    def _step(self, record: StepRecord) -> None:
        self._events.append(record)
        self._metrics.step(record)
        if self._stopped == self._job and self._engine is not None:
            self._engine.command(Command.STOP)

    @ray.method(concurrency_group="control")
    def events(self, start: int) -> list[Event]:
        """What happened in the current job, from event number `start` on."""
        return self._events[start:]

    @ray.method(concurrency_group="control")
    def stop(self, number: int) -> None:
        """End the job of this number after a step, on all ranks the same, with a checkpoint. A job that has
        not begun ends after its first step; one that is over is over."""
        self._stopped = number
        if self._engine is not None and self._job == number:
            self._engine.command(Command.STOP)


class RankGroup:
    """A group of `world` ranks with a loaded model, as a driver holds it.

    Args:
        config, degrees, timeout: see `runtime.engine.Engine` and `runtime.ranks.join`.
        world: number of ranks.

    Raises:
        BadRequestError: the cluster will never have room for it.
        JobFailedError: it did not come up.
    """

    def __init__(self, config: Config, world: int, degrees: Degrees, timeout: float):
        bundle = bundle_for(config, world, ray.nodes())
        self._placement: PlacementGroup = placement_group(
            [bundle.resources] * world, strategy=bundle.strategy
        )
        self._timeout, self._jobs = timeout, 0
        self._actors: list[Any] = []
        self.places: list[dict[str, Any]] = []
        try:
            self._wait_for_room(world, bundle)
            self._actors = self._order([self._actor(index, bundle) for index in range(world)])
            self.places = self._start(config, degrees, timeout)
        except BaseException:
            self.kill()
            raise

    def _wait_for_room(self, world: int, bundle: Bundle) -> None:
        if not self._placement.wait(_ROOM):
            raise NoRoomError(f"no room for {world} × {bundle.resources} within {_ROOM:.0f} s")

    def _actor(self, index: int, bundle: Bundle) -> Any:
        strategy = PlacementGroupSchedulingStrategy(self._placement, placement_group_bundle_index=index)
        resources = bundle.resources
        return RankActor.options(  # type: ignore[attr-defined]
            num_cpus=resources["CPU"], num_gpus=resources.get("GPU", 0), scheduling_strategy=strategy
        ).remote()

    def _order(self, actors: list[Any]) -> list[Any]:
        """Ranks of one node are neighbours."""
        places = _get([actor.place.remote() for actor in actors], "starting the ranks")
        order = sorted(range(len(actors)), key=lambda index: places[index][0])
        self._nodes = [places[index][0] for index in order]
        self._address = places[order[0]][1:]
        return [actors[index] for index in order]

    def _start(self, config: Config, degrees: Degrees, timeout: float) -> list[dict[str, Any]]:
        host, port = self._address
        seen: Counter[str] = Counter()
        starting = []
        for rank, (actor, node) in enumerate(zip(self._actors, self._nodes, strict=True)):
            rendezvous = Rendezvous.at(host, port, rank=rank, world=len(self._actors), local_rank=seen[node])
            seen[node] += 1
            starting.append(actor.start.remote(rendezvous, config, degrees, timeout))
        return list(_get(starting, "loading the model"))

    def run(self, job: Job) -> Iterator[Event | Ended]:
        """Do a job; yields what happens, the end last. After `FAILED` the group must be killed.

        The iterator may be asked to `stop` from outside meanwhile.
        """
        self._jobs += 1
        running = [actor.run.remote(self._jobs, job) for actor in self._actors]
        told, answered = 0, time.monotonic()
        while time.monotonic() - answered < 2 * self._timeout + _SILENCE:
            done, _ = ray.wait(running, num_returns=len(running), timeout=_POLL)
            fresh = self._events(told)
            if fresh is not None:
                answered = time.monotonic()
                told += len(fresh)
                yield from fresh
            if len(done) == len(running) or self._anyone_died(done):
                break
        ended = _end_of(running, within=2 * self._timeout + 10)
        yield from (self._events(told) or []) if ended.end is not End.FAILED else []
        yield ended

    def _events(self, start: int) -> list[Event] | None:
        """What the first rank has to tell; None if it does not answer."""
        try:
            return list(ray.get(self._actors[0].events.remote(start), timeout=_ANSWER))
        except (RayActorError, GetTimeoutError):
            return None  # it died or has stopped: the other ranks will say so, or else our own patience ends

    def _anyone_died(self, done: list[Any]) -> bool:
        """An actor that is gone is known as soon as Ray knows it; the others end by themselves."""
        for reference in done:
            try:
                ray.get(reference)
            except (RayActorError, RayTaskError):
                return True
        return False

    def stop(self) -> None:
        """End the current job after a step, with a checkpoint; a later job is not touched."""
        self._actors[0].stop.remote(self._jobs)

    def kill(self) -> None:
        """End all ranks and give their room back."""
        for actor in self._actors:
            ray.kill(actor, no_restart=True)
        for place in self.places:  # a stopped process does not hear Ray
            with contextlib.suppress(psutil.Error):
                if place["host"] == socket.gethostname() and _is_still(place):
                    psutil.Process(place["pid"]).kill()
        remove_placement_group(self._placement)


@dataclass(frozen=True, slots=True)
class Bundle:
    """What one rank takes, and how ranks are placed."""

    resources: dict[str, float]
    strategy: str


def bundle_for(config: Config, world: int, nodes: list[dict[str, Any]]) -> Bundle:
    """A GPU each where there are any, otherwise a CPU; within one node when it fits.

    Args:
        nodes: as `ray.nodes()` gives them.

    Raises:
        BadRequestError: all nodes together are too small.
    """
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    gpus = config.device != "cpu" and any(node.get("GPU", 0) >= 1 for node in alive)
    resources = {"CPU": 1.0} | ({"GPU": 1.0} if gpus else {})
    fits = [
        math.floor(min(node.get(name, 0) / amount for name, amount in resources.items())) for node in alive
    ]
    if sum(fits) < world:
        raise BadRequestError(
            f"ranks: {world} given; each takes {resources}, and the cluster has room for {sum(fits)}"
        )
    return Bundle(resources, "STRICT_PACK" if max(fits) >= world else "PACK")


def _is_still(place: dict[str, Any]) -> bool:
    """Whether the process of this number is the one that it was."""
    return bool(psutil.Process(place["pid"]).create_time() == place["born"])


def _get(references: list[Any], doing: str) -> Any:
    try:
        return ray.get(references)
    except RayTaskError as error:
        cause = error.cause
        raise cause if isinstance(cause, BadRequestError) else JobFailedError(f"{doing}: {cause}") from error
    except RayActorError as error:
        raise JobFailedError(f"{doing}: a rank died: {error}") from error


def _end_of(running: list[Any], within: float) -> Ended:
    """One end from those of all ranks, and from the deaths of those that did not tell."""
    ends: list[Ended] = []
    died: list[int] = []
    deadline = time.monotonic() + within
    for rank, reference in enumerate(running):
        try:
            ends.append(ray.get(reference, timeout=max(0.1, deadline - time.monotonic())))
        except (RayActorError, RayTaskError, GetTimeoutError):
            died.append(rank)
    for end in (End.FAILED, End.REFUSED, End.CANCELLED):
        for ended in ends:
            if ended.end is end:
                return ended
    if died:
        return Ended(End.FAILED, f"rank {died[0]} died")
    return ends[0]
