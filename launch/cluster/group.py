"""A rank group on Ray as its driver holds it: one placement group, one actor per rank."""

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

from launch.cluster.actor import Begun, End, Ended, Event, RankActor
from launch.cluster.placement import Bundle, bundle_for
from launch.shell.pulse import Pulse
from runtime.errors import BadRequestError, CancelledError, JobFailedError, LockstepError
from runtime.jobs.job import Job
from runtime.parallel.meeting import Rendezvous
from runtime.parallel.topology import Degrees
from runtime.request.config import Config

__all__ = ["Begun", "Bundle", "End", "Ended", "Event", "RankGroup", "StartError", "bundle_for"]

log = logging.getLogger(__name__)

_POLL = 0.2  # seconds between two looks at a running job
_ANSWER = 5.0  # seconds that a rank has to answer one of them
_SILENCE = 10.0  # seconds beyond two timeouts, after which a group that does not answer is given up
_ROOM = 120.0  # seconds to wait for a cluster to make room
_APPEAR = 300.0  # seconds for the processes of ranks to be there; a cluster may have to fetch an image first
_WITNESSES = 4  # ranks that are asked what they saw
_CALL = 30.0  # seconds beyond its own timeout that a call into Ray may take, before Ray itself is given up


class StartError(JobFailedError):
    """The ranks were there, and one of them failed or died while it loaded the model."""


class RankGroup:
    """A group of `world` ranks with a loaded model, as a driver holds it.

    Args:
        config, degrees, timeout: see `runtime.engine.Engine` and `runtime.parallel.ranks.join`.
        world: number of ranks.
        pulse: is told of calls into Ray; who watches it knows when Ray does not answer.
        unwanted: whether the group is needed no more; asked while it starts.

    Raises:
        BadRequestError: the cluster will never have room for it, or the model cannot be loaded.
        CancelledError: it was `unwanted`.
        JobFailedError: it did not come up.
    """

    def __init__(
        self,
        config: Config,
        world: int,
        degrees: Degrees,
        timeout: float,
        pulse: Pulse | None = None,
        unwanted: Callable[[], bool] = lambda: False,
    ):
        self._timeout, self._jobs, self._unwanted = timeout, 0, unwanted
        self._pulse = pulse or Pulse()
        self._placement: PlacementGroup | None = None
        self._actors: list[Any] = []
        self.places: list[dict[str, Any]] = []
        try:
            with _explained("placing the ranks"):
                self._place(bundle_for(config, world, self._call("its nodes", ray.nodes)), world)
            self.places = self._start(config, degrees)
        except BaseException:
            self.kill()
            raise

    def _place(self, bundle: Bundle, world: int) -> None:
        """One actor on each place; ranks of one node are neighbours."""
        placement = self._placement = self._call(
            "placing the ranks", placement_group, [bundle.resources] * world, strategy=bundle.strategy
        )
        deadline = time.monotonic() + _ROOM
        while not self._call("waiting for room", placement.wait, 1.0):
            self._check_wanted()
            if time.monotonic() > deadline:
                raise JobFailedError(f"no room for {world} × {bundle.resources} within {_ROOM:.0f} s")
        self._actors = [
            self._call("starting the ranks", self._actor, index, bundle) for index in range(world)
        ]
        places = self._results([actor.place.remote() for actor in self._actors], _APPEAR)
        order = sorted(range(world), key=lambda index: places[index][0])
        self._nodes = [places[index][0] for index in order]
        self._address = places[order[0]][1:]
        self._actors = [self._actors[index] for index in order]

    def _actor(self, index: int, bundle: Bundle) -> Any:
        strategy = PlacementGroupSchedulingStrategy(self._placement, placement_group_bundle_index=index)
        resources = bundle.resources
        return RankActor.options(  # type: ignore[attr-defined]
            num_cpus=resources["CPU"], num_gpus=resources.get("GPU", 0), scheduling_strategy=strategy
        ).remote()

    def _start(self, config: Config, degrees: Degrees) -> list[dict[str, Any]]:
        host, port = self._address
        seen: Counter[str] = Counter()
        starting = []
        for rank, (actor, node) in enumerate(zip(self._actors, self._nodes, strict=True)):
            rendezvous = Rendezvous.at(host, port, rank=rank, world=len(self._actors), local_rank=seen[node])
            seen[node] += 1
            starting.append(actor.start.remote(rendezvous, config, degrees, self._timeout))
        with _explained("loading the model", StartError):
            return self._results(starting)

    def _results(self, references: list[Any], within: float | None = None) -> list[Any]:
        """What all ranks return. Loading takes as long as it takes, so without a limit it is enough that
        every rank answers meanwhile."""
        started = answered = time.monotonic()
        while True:
            done = self._ready(references)
            if any(_error_of(reference) for reference in done):
                self._raise_first(references)
            if len(done) == len(references):
                return [self._call("what the ranks say", ray.get, reference) for reference in references]
            self._check_wanted()
            now = time.monotonic()
            if within is not None and now - started > within:
                raise JobFailedError(f"{len(references) - len(done)} ranks did not appear in {within:.0f} s")
            if within is None and now - answered > _ANSWER:
                silent = self._silent()
                if not silent:
                    answered = time.monotonic()
                elif now - answered > 2 * self._timeout + _SILENCE:
                    raise JobFailedError(f"rank {silent[0]} does not answer")

    def _raise_first(self, references: list[Any]) -> NoReturn:
        """Raise what one of them has raised: a refusal, if any refuses; the others fail because of it."""
        wait = self._wait(references, _ANSWER)
        errors = [error for reference in wait[0] if (error := _error_of(reference))]
        raise next((error for error in errors if isinstance(error, BadRequestError)), errors[0])

    def _silent(self) -> list[int]:
        """Ranks that do not answer just now."""
        asked = [actor.events.remote(0, 0) for actor in self._actors]
        answers = self._wait(asked, _ANSWER)[0]
        return [rank for rank, reference in enumerate(asked) if reference not in answers]

    def _check_wanted(self) -> None:
        if self._unwanted():
            raise CancelledError("stopped while the ranks were starting")

    def run(self, job: Job) -> Iterator[Event | Ended]:
        """Do a job; yields what happens, the end last. After `FAILED` and `HOPELESS` the group must
        be killed.

        The iterator may be asked to `stop` from outside meanwhile.
        """
        self._jobs += 1
        running = [actor.run.remote(self._jobs, job) for actor in self._actors]
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
        """What a rank that has not ended says of those that have; its main thread may be stuck."""
        asked = (self._ask(rank, "failure") for rank in end.missing[:_WITNESSES])
        return next((reason for reason in asked if reason), None)

    def _ask(self, rank: int, what: str, *arguments: Any) -> Any:
        """What a rank answers; None if it does not, as it died or has stopped: the others will say so, or
        else our own patience ends."""
        try:
            asked = getattr(self._actors[rank], what).remote
            return self._call(f"asking rank {rank}", lambda: ray.get(asked(*arguments), timeout=_ANSWER))
        except RayError:
            return None

    def _ready(self, references: list[Any]) -> list[Any]:
        """Those that have ended, after waiting a moment for them all."""
        done: list[Any] = self._wait(references, _POLL)[0]
        return done

    def _wait(self, references: list[Any], seconds: float) -> Any:
        return self._call(
            "waiting for the ranks", ray.wait, references, num_returns=len(references), timeout=seconds
        )

    def _call(self, doing: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """A call into Ray, which may not answer; `doing` is what a message then names."""
        with self._pulse.within(_ANSWER + _CALL, doing):
            return function(*arguments, **options)

    def stop(self) -> None:
        """End the current job after a step, with a checkpoint; a later job is not touched."""
        with contextlib.suppress(RayError, IndexError):  # dead, or not there yet
            self._actors[0].stop.remote(self._jobs)

    def kill(self) -> None:
        """End all ranks and give their room back."""
        for actor in self._actors:
            with contextlib.suppress(RayError):
                self._call("ending the ranks", ray.kill, actor, no_restart=True)
        for place in self.places:  # a stopped process does not hear Ray
            with contextlib.suppress(psutil.Error):
                if place["host"] == socket.gethostname() and _is_still(place):
                    psutil.Process(place["pid"]).kill()
        if self._placement is not None:
            with contextlib.suppress(RayError):
                self._call("giving room back", remove_placement_group, self._placement)


class _Ends:
    """How the ranks of a job end, as it becomes known.

    Attributes:
        missing: ranks that have not ended.
        bad: whether one has failed or died.
    """

    def __init__(self, world: int):
        self.missing = list(range(world))
        self._ended: list[Ended] = []
        self._died: list[str] = []  # in the order in which they were found dead
        self._explained = ""  # by a rank that saw it happen
        self._since: float | None = None  # the first failed

    @property
    def bad(self) -> bool:
        return self._since is not None

    def over(self, patience: float) -> bool:
        """Whether all have ended, or one has failed so long ago that the others are stuck."""
        waited = 0.0 if self._since is None else time.monotonic() - self._since
        return not self.missing or waited > patience

    def note(self, running: list[Any], done: list[Any]) -> None:
        """Take notice of ranks that have ended."""
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
                self._died.append(f"rank {rank} was lost: {_first_line(error)}")
            if self._since is None and (self._died or self._ended[-1].end in (End.FAILED, End.HOPELESS)):
                self._since = time.monotonic()

    def explain(self, reason: str | None) -> None:
        """A rank says what it saw."""
        self._explained = self._explained or reason or ""

    def _reasons(self) -> list[str]:
        """Why the group is lost, from the best known to the least. Where one alone has refused, the others
        have failed because of it."""
        if not self.bad:
            return []
        failed = [e.reason for end in (End.REFUSED, End.FAILED) for e in self._ended if e.end is end]
        return [reason for reason in (*failed, self._explained, *self._died) if reason]

    def told(self) -> Ended:
        """One end from those of all ranks."""
        hopeless = next((ended for ended in self._ended if ended.end is End.HOPELESS), None)
        if hopeless is not None:  # whatever became of the others for it
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
        return next((ended for ended in self._ended if ended.report), self._ended[0])  # in any order


def _is_still(place: dict[str, Any]) -> bool:
    """Whether the process of this number is the one that it was."""
    return bool(psutil.Process(place["pid"]).create_time() == place["born"])


def _error_of(reference: Any) -> Exception | None:
    """What a call that has returned has raised, if it has."""
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
    """Errors of Ray as errors of Lockstep.

    Raises:
        BadRequestError: a rank said so.
        JobFailedError: of this `kind` where a rank is what failed.
    """
    try:
        yield
    except RayTaskError as error:
        cause = error.cause
        raise kind(f"{doing}: {cause if isinstance(cause, LockstepError) else repr(cause)}") from error
    except RayActorError as error:
        raise kind(f"{doing}: a rank died: {_first_line(error)}") from error
    except GetTimeoutError as error:
        raise JobFailedError(f"{doing}: Ray does not answer") from error
    except RayError as error:
        raise JobFailedError(f"{doing}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
