"""A rank group on Ray, as its driver sees it: one placement group, one actor per rank."""

from __future__ import annotations

import contextlib
import logging
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import psutil
import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from launch.cluster.actor import Begun, End, Ended, Event, Previewed, RankActor
from launch.cluster.placement import Bundle, bundle_for
from launch.shell.pulse import Pulse
from launch.shell.terminal import counted
from runtime.errors import BadRequestError, CancelledError, JobFailedError, in_words, named
from runtime.jobs.job import Job
from runtime.parallel.meeting import Rendezvous
from runtime.parallel.network import network_settings

__all__ = ["Begun", "Bundle", "End", "Ended", "Event", "Previewed", "RankGroup", "StartError", "bundle_for"]

log = logging.getLogger(__name__)

_POLL = 0.2  # seconds between two polls of a running job
_ANSWER = 5.0  # seconds for a rank to answer a poll
_SILENCE = 10.0  # seconds beyond two timeouts after which a group that does not answer is abandoned
_ROOM = 120.0  # seconds to wait for a cluster to make room
_APPEAR = 300.0  # seconds for the ranks' processes to start; a cluster may have to pull an image first
_WITNESSES = 4  # ranks that are asked for a diagnosis
_CALL = 30.0  # seconds beyond its own timeout that a call into Ray may take before Ray is abandoned


class StartError(JobFailedError):
    """A rank failed or died while it loaded the model, after all had started."""


class RankGroup:
    """A group of ranks with a loaded model, as its driver sees it.

    Args:
        job: a job that it is to run; it can run every job that needs the same config, ranks and timeout.
        pulse: registers calls into Ray, so that another thread notices when Ray does not answer.
        unwanted: returns whether the group is no longer needed; polled while it starts.

    Raises:
        BadRequestError: the cluster will never have room for it, or the model cannot be loaded.
        CancelledError: it was `unwanted`.
        JobFailedError: it could not be started.
    """

    def __init__(
        self,
        job: Job,
        pulse: Pulse | None = None,
        unwanted: Callable[[], bool] = lambda: False,
    ):
        self._timeout, self._jobs, self._unwanted = job.timeout, 0, unwanted
        self._pulse = pulse or Pulse()
        self._placement: PlacementGroup | None = None
        self._actors: list[Any] = []
        self.places: list[dict[str, Any]] = []
        try:
            with _explained("placing the ranks"):
                self._place(job)
            self.places = self._start(job)
        except BaseException:
            self.kill()
            raise

    def _bundle(self, job: Job) -> Bundle:
        return bundle_for(job.config, job.world, self._call("listing the nodes", ray.nodes))

    def _place(self, job: Job) -> None:
        """Start one actor in each bundle and number them so that ranks of one node are neighbours.

        Ranks on the driver's node come first, so that files are written where the job was started.
        """
        bundle, world = self._bundle(job), job.world
        placement = self._placement = self._call(
            "placing the ranks", placement_group, [bundle.resources] * world, strategy=bundle.strategy
        )
        deadline = time.monotonic() + _ROOM
        while not self._call("waiting for room", placement.wait, 1.0):
            self._check_wanted()
            self._bundle(job)  # raises if there will be no room, as nodes were lost meanwhile
            if time.monotonic() > deadline:
                raise JobFailedError(f"no room for {world} ranks with {bundle} each within {_ROOM:.0f} s")
        self._actors = [
            self._call("starting the ranks", self._actor, index, bundle) for index in range(world)
        ]
        places = self._results([actor.place.remote() for actor in self._actors], _APPEAR)
        own = ray.get_runtime_context().get_node_id()
        order = sorted(range(world), key=lambda index: (places[index][0] != own, places[index][0]))
        self._nodes = [places[index][0] for index in order]
        self._address = places[order[0]][1:]
        self._actors = [self._actors[index] for index in order]

    def _actor(self, index: int, bundle: Bundle) -> Any:
        strategy = PlacementGroupSchedulingStrategy(self._placement, placement_group_bundle_index=index)
        resources = bundle.resources
        return RankActor.options(  # type: ignore[attr-defined]
            num_cpus=resources["CPU"], num_gpus=resources.get("GPU", 0), scheduling_strategy=strategy
        ).remote()

    def _start(self, job: Job) -> list[dict[str, Any]]:
        host, port = self._address
        seen: Counter[str] = Counter()
        starting = []
        for rank, (actor, node) in enumerate(zip(self._actors, self._nodes, strict=True)):
            rendezvous = Rendezvous.at(host, port, rank=rank, world=len(self._actors), local_rank=seen[node])
            seen[node] += 1
            network = network_settings()
            starting.append(actor.start.remote(rendezvous, job.config, job.degrees, job.timeout, network))
        with _explained("loading the model", StartError):
            return self._results(starting)

    def _results(self, references: list[Any], within: float | None = None) -> list[Any]:
        """Wait for what all ranks return. Without the limit `within` it is enough that all of them keep
        answering, as loading takes as long as it takes."""
        started = answered = time.monotonic()
        while True:
            done = self._ready(references)
            if any(_error_of(reference) for reference in done):
                self._raise_first(references)
            if len(done) == len(references):
                return [
                    self._call("fetching the ranks' results", ray.get, reference) for reference in references
                ]
            self._check_wanted()
            now = time.monotonic()
            if within is not None and now - started > within:
                raise JobFailedError(
                    f"{counted(len(references) - len(done), 'rank')} did not start within {within:.0f} s"
                )
            if within is None and now - answered > _ANSWER:
                silent = self._silent()
                if not silent:
                    answered = time.monotonic()
                elif now - answered > 2 * self._timeout + _SILENCE:
                    raise JobFailedError(f"rank {silent[0]} does not answer")

    def _raise_first(self, references: list[Any]) -> NoReturn:
        """Raise one rank's error: a refusal if there is one, as the others fail because of it."""
        wait = self._wait(references, _ANSWER)
        errors = [error for reference in wait[0] if (error := _error_of(reference))]
        raise next((error for error in errors if isinstance(error, BadRequestError)), errors[0])

    def _silent(self) -> list[int]:
        """Return the ranks that do not answer now."""
        asked = [actor.events.remote(0, 0) for actor in self._actors]
        answers = self._wait(asked, _ANSWER)[0]
        return [rank for rank, reference in enumerate(asked) if reference not in answers]

    def _check_wanted(self) -> None:
        if self._unwanted():
            raise CancelledError("stopped while the ranks were starting")

    def run(self, job: Job, *, previews: bool = False) -> Iterator[Event | Ended]:
        """Run a job; yields its events, `Ended` last. After `FAILED` and `HOPELESS` the group must be killed.

        `stop` may be called from another thread meanwhile.

        Args:
            previews: whether previews are to be among the events.
        """
        try:
            yield from self._watched(job, previews=previews)
        except RayError as error:  # of Ray itself, whatever became of the ranks
            yield Ended(End.FAILED, f"watching the ranks: {named(error)}")

    def _watched(self, job: Job, *, previews: bool) -> Iterator[Event | Ended]:
        self._jobs += 1
        running = [actor.run.remote(self._jobs, job, previews=previews) for actor in self._actors]
        told, answered, end = 0, time.monotonic(), _Ends(len(running))
        while not end.over(self._timeout) and time.monotonic() - answered < 2 * self._timeout + _SILENCE:
            end.note(running, self._ready(running))
            fresh = self._ask(0, "events", self._jobs, told)
            if fresh is not None:
                answered = time.monotonic()
                told += len(fresh)
                yield from fresh
            if end.bad:
                end.explain(self._failure(end))
        ended = end.told()
        yield from (self._ask(0, "events", self._jobs, told) or []) if ended.end is not End.FAILED else []
        yield ended

    def _failure(self, end: _Ends) -> str | None:
        """Ask ranks that have not ended why others did; their main threads may be stuck."""
        asked = (self._ask(rank, "failure") for rank in end.missing[:_WITNESSES])
        return next((reason for reason in asked if reason), None)

    def _ask(self, rank: int, what: str, *arguments: Any) -> Any:
        """Return a rank's answer; None if it is dead or stopped: other ranks will report that, or a
        timeout ends the wait."""
        try:
            asked = getattr(self._actors[rank], what).remote
            return self._call(f"asking rank {rank}", lambda: ray.get(asked(*arguments), timeout=_ANSWER))
        except RayError:
            return None

    def _ready(self, references: list[Any]) -> list[Any]:
        """Return the references that are ready, after waiting briefly for all."""
        done: list[Any] = self._wait(references, _POLL)[0]
        return done

    def _wait(self, references: list[Any], seconds: float) -> Any:
        return self._call(
            "waiting for the ranks", ray.wait, references, num_returns=len(references), timeout=seconds
        )

    def _call(self, doing: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Make a call into Ray, which may not answer; a message then names `doing`."""
        with self._pulse.within(_ANSWER + _CALL, doing):
            return function(*arguments, **options)

    def stop(self) -> None:
        """Stop the current job after a step, with a checkpoint; later jobs are not affected."""
        with contextlib.suppress(RayError, IndexError):  # dead, or not started yet
            self._actors[0].stop.remote(self._jobs)

    def kill(self) -> None:
        """Kill all ranks and release their resources."""
        for actor in self._actors:
            with contextlib.suppress(RayError):
                self._call("ending the ranks", ray.kill, actor, no_restart=True)
        for place in self.places:  # a stopped process does not react to Ray
            with contextlib.suppress(psutil.Error):
                if place["host"] == socket.gethostname() and _is_still(place):
                    psutil.Process(place["pid"]).kill()
        if self._placement is not None:
            with contextlib.suppress(RayError):
                self._call("releasing the ranks' resources", remove_placement_group, self._placement)


class _Ends:
    """Collects how the ranks of a job end and makes one result of it.

    Attributes:
        missing: ranks that have not ended.
        bad: whether a rank has failed or died.
    """

    def __init__(self, world: int):
        self.missing = list(range(world))
        self._ended: list[Ended] = []
        self._died: list[str] = []  # messages, in the order in which deaths were noticed
        self._explained = ""  # diagnosis of a rank that saw it happen
        self._since: float | None = None  # when the first failure was noticed

    @property
    def bad(self) -> bool:
        return self._since is not None

    def over(self, patience: float) -> bool:
        """Return whether all ranks have ended, or one failed so long ago that the others must be stuck."""
        waited = 0.0 if self._since is None else time.monotonic() - self._since
        return not self.missing or waited > patience

    def note(self, running: list[Any], done: list[Any]) -> None:
        """Record ranks that have ended."""
        for rank in [rank for rank in self.missing if running[rank] in done]:
            self.missing.remove(rank)
            try:
                ended = ray.get(running[rank])
                self._ended.append(ended)
            except RayTaskError as error:
                self._died.append(f"rank {rank} failed: {error.cause}")
            except RayActorError:
                self._died.append(f"rank {rank} died")
            except RayError as error:
                self._died.append(f"rank {rank} was lost: {named(error)}")
            if self._since is None and (self._died or self._ended[-1].end in (End.FAILED, End.HOPELESS)):
                self._since = time.monotonic()

    def explain(self, reason: str | None) -> None:
        """Record a rank's diagnosis; the first one counts."""
        self._explained = self._explained or reason or ""

    def _reasons(self) -> list[str]:
        """Reasons why the group was lost, best first. If one rank refused, others failed because of it."""
        if not self.bad:
            return []
        failed = [e.reason for end in (End.REFUSED, End.FAILED) for e in self._ended if e.end is end]
        return [reason for reason in (*failed, self._explained, *self._died) if reason]

    def told(self) -> Ended:
        """Return the end of the job, from the ends of all ranks."""
        hopeless = next((ended for ended in self._ended if ended.end is End.HOPELESS), None)
        if hopeless is not None:  # however the others ended because of it
            return hopeless
        reasons = self._reasons()
        if reasons:
            return Ended(End.FAILED, reasons[0])
        if self.missing:
            return Ended(End.FAILED, f"rank {self.missing[0]} does not answer")
        for end in (End.REFUSED, End.CANCELLED):
            for ended in self._ended:
                if ended.end is end:
                    return ended
        return next((ended for ended in self._ended if ended.report), self._ended[0])  # order does not matter


def _is_still(place: dict[str, Any]) -> bool:
    """Return whether the process with this id is still the same one."""
    return bool(psutil.Process(place["pid"]).create_time() == place["born"])


def _error_of(reference: Any) -> Exception | None:
    """Return the exception that a finished call raised, if any."""
    try:
        ray.get(reference)
    except RayTaskError as error:
        refused = isinstance(error.cause, BadRequestError)
        raised: Exception = BadRequestError(str(error.cause)) if refused else error
    except RayError as error:
        raised = error
    else:
        return None
    return raised


@contextlib.contextmanager
def _explained(doing: str, kind: type[JobFailedError] = JobFailedError) -> Iterator[None]:
    """Translate Ray's errors into Lockstep's.

    Raises:
        BadRequestError: a rank refused.
        JobFailedError: Ray failed; of class `kind` if a rank did.
    """
    try:
        yield
    except RayTaskError as error:
        raise kind(f"{doing}: {in_words(error.cause)}") from error
    except RayActorError as error:
        raise kind(f"{doing}: a rank died: {named(error)}") from error
    except GetTimeoutError as error:
        raise JobFailedError(f"{doing}: Ray does not answer") from error
    except RayError as error:
        raise JobFailedError(f"{doing}: {named(error)}") from error
