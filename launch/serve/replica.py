"""A replica of a pool: holds one rank group at a time and runs requests on it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from launch.cluster.group import Begun, End, Ended, Event, Previewed, RankGroup, StartError
from launch.cluster.placement import NoRoomError
from launch.serve.entries import EXPIRED, Entry, Progress, ReplicaEntry, RunEvent, State
from launch.serve.events import run_event
from launch.serve.kinds import group_of, kind_of
from launch.serve.queue import Queue, QueueError
from runtime.errors import BadRequestError, CancelledError, JobFailedError, in_words, named
from runtime.jobs.job import Job
from runtime.media.preview import PreviewFile
from spectrum import TimeLeft

if TYPE_CHECKING:
    from launch.serve.pool import ReplicaPool

log = logging.getLogger("launch")

KILLS = 2  # crashed rank groups after which a request is set aside
BACKOFF = 1.0  # seconds before a group is replaced; doubled with each failure in a row, up to 64 times
LOOK = 0.3  # seconds between two polls of the queue
_RETIRE = 3  # groups in a row that did not start, after which a replica is retired
_PATIENCE = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)  # seconds between attempts to access the queue
_TELL = 0.5  # seconds between two progress reports of a request

_Kept = TypeVar("_Kept")
OnEvent = Callable[[Entry, Event | Ended, RankGroup], None]


class Replica:
    """Runs requests of a queue on a rank group, which it replaces when needed.

    Attributes:
        problem: why it was retired; empty while it serves.
        busy: it runs a request, or is taking one.
    """

    def __init__(self, number: int, queue: Queue, pool: ReplicaPool, on_event: OnEvent):
        self.number, self.problem, self.busy = number, "", False
        self._queue, self._pool, self._on_event = queue, pool, on_event
        self._group: RankGroup | None = None
        self._runs = ""  # `group_of` the jobs that the group can run
        self._loaded = ""  # `kind_of` the last of them
        self._entry: Entry | None = None
        self._unwanted = ""  # why the current request is to end early
        self._at = threading.Lock()  # guards the two fields above together
        self._failures = 0  # groups in a row that were lost
        self._failed_starts = 0  # groups in a row that did not start
        self._restarts = 0
        self._mute = False

    def serve(self) -> None:
        """Run requests of the queue, one after another, until it is empty or the pool stops."""
        try:
            self._show("waiting")
            while not self._pool.ending and self._failed_starts < _RETIRE:
                self.busy = True
                entry = self._kept(lambda: self._queue.take(self.number, self._loaded))
                self._turn_to(entry)
                if entry is not None:
                    self._do(entry)
                    self._turn_to(None)
                    continue
                self.busy = False
                if self._pool.idle:
                    break
                self._pool.pause(LOOK)
        except BaseException as error:  # the queue is unusable, or Ray ends the thread with SystemExit
            self.dismiss()
            log.exception("replica %d stops", self.number)
            self.problem = f"replica {self.number}: {in_words(error)}"
            self._pool.fail(self.problem)
        finally:
            self.dismiss()
            self.busy = False
            self._show("gone")

    def _kept(self, write: Callable[[], _Kept]) -> _Kept:
        """Access the queue, retrying for a minute: a result that is not recorded is lost, or made twice.

        Raises:
            QueueError: every attempt failed.
        """
        for seconds in _PATIENCE:
            try:
                return write()
            except QueueError as error:
                log.warning("%s; retrying", error)
                time.sleep(seconds)
        return write()

    def _turn_to(self, entry: Entry | None) -> None:
        with self._at:
            self._entry, self._unwanted = entry, ""

    def look(self) -> None:
        """Check whether the current request was cancelled or has expired; called by another thread."""
        entry = self._entry
        if entry is None:
            return
        now, why = self._queue.find(entry.id), ""
        if now is None:  # it has ended, and was forgotten, since this replica was asked for it
            return
        if now.unwanted:
            why = "cancelled"
        elif now.deadline is not None and time.time() > now.deadline:
            why = EXPIRED
        with self._at:
            if why and self._entry is entry:  # unless the request has ended meanwhile
                self._unwanted = why
                self.stop()

    def stop(self) -> None:
        """Stop the current request after a step; called by another thread."""
        group = self._group
        if group is not None:
            group.stop()

    def dismiss(self) -> None:
        """End the rank group."""
        group, self._group, self._runs, self._loaded = self._group, None, "", ""
        if group is not None:
            group.kill()

    def _do(self, entry: Entry) -> None:
        """Run one request and record its end, whatever happens to the group."""
        if entry.kills >= KILLS:  # losses that were counted when the queue was taken over
            self._set_aside(entry, entry.kills, "Ray was lost while it ran")
            return
        try:
            job = entry.job if entry.tries == 1 else entry.job.retried(restart=True)
            group = self._group_for(job)
            self._failed_starts = 0
            self._show("working")
            ended = self._run(entry, job, group)
        except QueueError:
            raise
        except NoRoomError as error:
            self._no_room(entry, job.world, str(error))
        except BadRequestError as error:
            self._end(entry, State.FAILED, str(error))
        except CancelledError as error:  # while its ranks were starting
            self._finish(entry, Ended(End.CANCELLED, str(error)))
        except StartError as error:  # the request's fault or the ranks': the replica may still serve another
            self._lose(entry, str(error))
        except JobFailedError as error:  # Ray failed
            self._wait_for_ray(entry, str(error))
        except Exception as error:
            log.exception("%s: unexpected failure", entry.name)
            self._lose(entry, f"unexpected failure: {named(error)}")
        else:
            self._finish(entry, ended)

    def _no_room(self, entry: Entry, world: int, reason: str) -> None:
        """Fail a request for which the cluster is too small; or let it wait if it, or one with as many
        ranks, has fitted before: then nodes were lost."""
        if world <= self._pool.largest or entry.tries > 1:
            self._wait_for_ray(entry, f"nodes of the cluster are lost: {reason}")
        else:
            self._end(entry, State.FAILED, reason)

    def _wait_for_ray(self, entry: Entry, reason: str) -> None:
        """Let a request wait as no group can be started now; after some attempts, retire the replica."""
        self._failed_starts += 1
        self.problem = f"replica {self.number}: {reason}" if self._failed_starts >= _RETIRE else ""
        self._lose(entry, reason, killed=False)

    def _group_for(self, job: Job) -> RankGroup:
        """Return the current group if it can run the job, otherwise a new one."""
        if self._group is None or self._runs != group_of(job):
            self.dismiss()
            self._show("starting")
            self._group = RankGroup(_without_loras(job), self._pool.pulse, self._is_unwanted)
            self._runs = group_of(job)
        self._loaded = kind_of(job)
        self._pool.largest = max(self._pool.largest, job.world)
        return self._group

    def _is_unwanted(self) -> bool:
        return bool(self._unwanted) or self._pool.ending

    def _run(self, entry: Entry, job: Job, group: RankGroup) -> Ended:
        with self._preview_of(entry, job) as preview:
            return self._follow(entry, job, group, preview)

    def _preview_of(self, entry: Entry, job: Job) -> AbstractContextManager[PreviewFile | None]:
        """The file for a request's previews: its own, or the pool's if that keeps any."""
        if job.outputs.preview is not None:
            return PreviewFile(job.outputs.preview, overwrite=job.outputs.overwrite)
        return nullcontext() if self._pool.previews is None else self._pool.previews.of(entry.id)

    def _follow(self, entry: Entry, job: Job, group: RankGroup, preview: PreviewFile | None) -> Ended:
        """Run a request, and record its progress, to the end."""
        progress, left, told, fresh = Progress(), TimeLeft([]), 0.0, list[RunEvent]()
        for event in group.run(job, previews=preview is not None):
            self._say(entry, event, group)
            if isinstance(event, Ended):
                self._tell(entry, replace(progress, preview=""), fresh)
                return event
            if isinstance(event, Previewed):
                if preview is not None and event.content and preview.put(event.content):
                    progress = replace(progress, preview=str(preview.path))
                    fresh.append(run_event(event, progress))
            else:
                if isinstance(event, Begun):
                    progress = Progress(event.label, steps=len(event.kinds), preview=progress.preview)
                    left, told = TimeLeft(event.kinds), 0
                else:
                    left.add(event.index, event.kind, event.seconds)
                    done, seconds = event.index + 1, left.seconds
                    progress = replace(progress, step=done, nfe=left.nfe, seconds_left=seconds)
                fresh.append(run_event(event, progress))
            if self._is_unwanted():
                group.stop()
            if time.monotonic() - told > _TELL:
                told = time.monotonic()
                self._tell(entry, progress, fresh)
                fresh = []
        raise RuntimeError("a job ended without an end")

    def _say(self, entry: Entry, event: Event | Ended, group: RankGroup) -> None:
        """Call `on_event`; an output without a reader, such as a closed pipe, must not cost a video."""
        try:
            self._on_event(entry, event, group)
        except OSError as error:
            if not self._mute:
                log.warning("events of replica %d are no longer shown: %s", self.number, error)
            self._mute = True

    def _tell(self, entry: Entry, progress: Progress, events: Sequence[RunEvent]) -> None:
        try:
            self._queue.report(entry.id, progress, events)
        except QueueError as error:  # the next report makes up for it
            log.warning("%s", error)
        seconds_left = progress.seconds_left or 0.0
        self._pool.metrics.progress(self.number, progress.step, seconds_left)

    def _finish(self, entry: Entry, ended: Ended) -> None:
        """Record how a request ended."""
        match ended.end:
            case End.DONE:
                self._end(entry, State.DONE)
            case End.REFUSED if entry.tries == 1:  # there are no checkpoints to name
                self._end(entry, State.FAILED, ended.reason)
            case End.REFUSED:
                self._leave(entry, State.FAILED, ended.reason)
            case End.CANCELLED if self._unwanted:
                self._leave(entry, State.CANCELLED, f"{self._unwanted}; {ended.reason}")
            case End.CANCELLED:
                self._put_back(entry, "the pool was told to stop", killed=False)
            case End.HOPELESS:
                self.dismiss()
                self._end(entry, State.FAILED, ended.reason)
            case End.FAILED:
                self._lose(entry, ended.reason)
                return
        self._failures = 0
        self._show("waiting")

    def _lose(self, entry: Entry, reason: str, *, killed: bool = True) -> None:
        """Put back or end a request whose group crashed (`killed`) or could not be started."""
        if killed:
            self._pool.look()
        self.dismiss()
        self._restarts += 1
        self._pool.metrics.restarted()
        killed = killed and not self._pool.ending  # the end of the pool is not the request's fault
        kills = entry.kills + killed
        if self._unwanted:
            self._leave(entry, State.CANCELLED, f"{self._unwanted}; {reason}")
        elif kills >= KILLS:
            self._set_aside(entry, kills, reason)
        else:
            log.warning("%s: %s; it will be retried with new ranks", entry.name, reason)
            self._put_back(entry, reason, killed=killed)
        self._show("waiting for a new group")
        self._pool.pause(BACKOFF * 2 ** min(self._failures, 6))
        self._failures += 1

    def _set_aside(self, entry: Entry, kills: int, reason: str) -> None:
        self._leave(
            entry, State.FAILED, f"stopped after it crashed {kills} rank groups; the last failure: {reason}"
        )

    def _leave(self, entry: Entry, state: State, reason: str) -> None:
        """End a request whose checkpoints are kept; the reason says how to resume it."""
        advice = self._pool.advice(entry)
        self._end(entry, state, f"{reason}; {advice}" if advice else reason)

    def _put_back(self, entry: Entry, reason: str, *, killed: bool) -> None:
        self._kept(lambda: self._queue.put_back(entry.id, reason, killed=killed))

    def _end(self, entry: Entry, state: State, reason: str = "") -> None:
        self._kept(lambda: self._queue.end(entry.id, state, reason))
        self._pool.metrics.ended(state)
        log.info("%s: %s", entry.name, f"{state} {reason}".rstrip())

    def _show(self, state: str) -> None:
        """Record this replica's state for `lockstep status`."""
        places = [] if self._group is None else self._group.places
        told = [{key: place[key] for key in ("rank", "host", "device", "pid")} for place in places]
        try:
            self._queue.show_replica(ReplicaEntry(self.number, state, told, self._restarts))
        except QueueError as error:
            log.warning("%s", error)


def _without_loras(job: Job) -> Job:
    """The job without its LoRAs, which a group merges when it runs the job."""
    return replace(job, config=job.config.model_copy(update={"lora": ()}))
