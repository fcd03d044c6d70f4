"""Replicas that serve a queue: K rank groups, each at one request at a time, replaced when they die.

What a storyboard, a server or `lockstep queue run` stands on. The queue is on disk: a pool may be killed, and
another one goes on where it was.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from launch.entries import Entry, Progress, ReplicaEntry, State
from launch.jobs import Job
from launch.metrics import DriverMetrics
from launch.progress import TimeLeft
from launch.pulse import Pulse
from launch.queue import Queue, QueueError, kind_of
from launch.ray_group import Begun, End, Ended, Event, RankGroup, StartError
from runtime.errors import BadRequestError, CancelledError, JobFailedError

log = logging.getLogger("launch")

KILLS = 2  # rank groups that a request may cost
BACKOFF = 1.0  # seconds before a group is replaced; doubled each time in a row, to 64 times as much
_RETIRE = 3  # groups in a row that did not come up, after which a replica is given up
_LOOK = 0.3  # seconds between two looks at the queue
_PATIENCE = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)  # seconds between attempts to write to the queue
_TELL = 0.5  # seconds between two progress reports of a request

_Kept = TypeVar("_Kept")
OnEvent = Callable[[Entry, Event | Ended, RankGroup], None]


class ReplicaPool:
    """K replicas that do what is in a queue.

    Args:
        queue: served by nobody else meanwhile.
        replicas: how many; each takes the ranks of the request that it is at.
        on_event: told of what happens, in the replica's thread, with the request and the group at work on it.
        pulse: see `RankGroup`.

    Example:
        >>> ray.init()
        >>> ReplicaPool(Queue(Path("films")), replicas=2).run()
    """

    def __init__(
        self,
        queue: Queue,
        replicas: int,
        on_event: OnEvent = lambda entry, event, group: None,
        pulse: Pulse | None = None,
    ) -> None:
        self._queue, self._ending, self.metrics = queue, threading.Event(), DriverMetrics()
        self.pulse, self._problem = pulse, ""
        self._replicas = [Replica(number, queue, self, on_event) for number in range(replicas)]
        self._keep = False

    def run(self, *, keep: bool = False, again: bool = False) -> None:
        """Serve the queue until it is empty, or until `stop`.

        Args:
            keep: wait for more when it is empty.
            again: another driver served it before and its Ray was lost, perhaps for one of its requests.

        Raises:
            BadRequestError: another pool serves the queue.
            JobFailedError: no replica is left, or the queue cannot be used any more; requests that wait still
                wait.
        """
        self._keep = keep
        with self._queue.served(lost=again), self._watched():
            threads = [
                threading.Thread(target=replica.serve, name=f"replica-{replica.number}", daemon=True)
                for replica in self._replicas
            ]
            for thread in threads:
                thread.start()
            try:
                for thread in threads:
                    while thread.is_alive():  # a join without a timeout would not let signals through
                        thread.join(_LOOK)
            except BaseException:
                self._ending.set()
                for replica in self._replicas:
                    replica.dismiss()
                for thread in threads:
                    thread.join(2 * _LOOK)
                raise
        if self._problem:
            raise JobFailedError(f"{self._problem}; the requests that are left wait in the queue")
        gone = [replica.problem for replica in self._replicas if replica.problem]
        if len(gone) == len(self._replicas):
            raise JobFailedError(f"no replica is left: {gone[0]}; the requests that wait are kept")

    def fail(self, problem: str) -> None:
        """End it all: nothing that a replica could do would be written down."""
        self._problem = self._problem or problem
        self.stop()

    def stop(self) -> bool:
        """End after a step: running requests wait again, with checkpoints to go on from. True: it can."""
        self._ending.set()
        for replica in self._replicas:
            replica.stop()
        return True

    @property
    def ending(self) -> bool:
        """Whether it was told to stop."""
        return self._ending.is_set()

    def pause(self, seconds: float) -> None:
        """Wait, unless it ends."""
        self._ending.wait(seconds)

    @property
    def idle(self) -> bool:
        """Whether there is nothing more to come: nothing waits, and nobody works at what may wait again."""
        at_work = any(replica.busy for replica in self._replicas)  # before the look at the queue
        return not self._keep and not at_work and not self._queue.count()[State.WAITING]

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Deadlines and cancelled requests are seen to meanwhile."""
        over = threading.Event()

        def watch() -> None:
            while not over.wait(_LOOK):
                try:
                    self._look()
                except QueueError as error:
                    log.warning("deadlines and cancellations wait: %s", error)
                except Exception as error:
                    log.exception("the pool ends")
                    self.fail(f"deadlines and cancellations cannot be seen to: {error!r}")
                    return

        thread = threading.Thread(target=watch, name="pool-watch", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _look(self) -> None:
        self._queue.expire()
        count = self._queue.count()
        self.metrics.queue(count[State.WAITING], count[State.RUNNING])
        for replica in self._replicas:
            replica.look()


class Replica:
    """One rank group after another, and the request that it is at.

    Attributes:
        problem: why it was given up; empty while it serves.
        busy: it is at a request, or taking one.
    """

    def __init__(self, number: int, queue: Queue, pool: ReplicaPool, on_event: OnEvent):
        self.number, self.problem, self.busy = number, "", False
        self._queue, self._pool, self._on_event = queue, pool, on_event
        self._group: RankGroup | None = None
        self._loaded = ""  # what kind of jobs the group can do
        self._entry: Entry | None = None
        self._unwanted = ""  # why the request that it is at is to end
        self._at = threading.Lock()  # held where the two change, or one is acted on for the sake of the other
        self._failures = 0  # groups in a row that came to a bad end
        self._stillborn = 0  # groups in a row that did not come up
        self._restarts = 0
        self._mute = False

    def serve(self) -> None:
        """Do what is in the queue, one request after another."""
        try:
            while not self._pool.ending and self._stillborn < _RETIRE:
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
                self._pool.pause(_LOOK)
        except Exception as error:  # the queue cannot be read or written: nothing that another could mend
            self.dismiss()
            log.exception("replica %d ends", self.number)
            self.problem = f"replica {self.number}: {error}"
            self._pool.fail(self.problem)
        finally:
            self.dismiss()
            self.busy = False
            self._show("gone")

    def _kept(self, write: Callable[[], _Kept]) -> _Kept:
        """Write to the queue, more than once if need be: what is not written down is lost or done twice.

        Raises:
            QueueError: it could not be written in a minute.
        """
        for seconds in _PATIENCE:
            try:
                return write()
            except QueueError as error:
                log.warning("%s; trying again", error)
                time.sleep(seconds)
        return write()

    def _turn_to(self, entry: Entry | None) -> None:
        with self._at:
            self._entry, self._unwanted = entry, ""

    def look(self) -> None:
        """See whether the request that it is at is still wanted; called by another thread."""
        entry = self._entry
        if entry is None:
            return
        now, why = self._queue.entry(entry.id), ""
        if now.unwanted:
            why = "cancelled"
        elif now.deadline is not None and time.time() > now.deadline:
            why = "its deadline passed"
        with self._at:
            if why and self._entry is entry:  # the queue may have answered late
                self._unwanted = why
                self.stop()

    def stop(self) -> None:
        """End the request that it is at after a step; called by another thread."""
        group = self._group
        if group is not None:
            group.stop()

    def dismiss(self) -> None:
        """End the ranks."""
        group, self._group, self._loaded = self._group, None, ""
        if group is not None:
            group.kill()

    def _do(self, entry: Entry) -> None:
        """One request, whatever it does to the group or to this replica."""
        if entry.kills >= KILLS:  # or else it was set aside already
            self._set_aside(entry, entry.kills, "Ray was lost while it ran")
            return
        try:
            job = entry.job if entry.tries == 1 else entry.job.going_on()
            group = self._group_for(job)
            self._stillborn = 0
            self._show("working")
            ended = self._run(entry, job, group)
        except QueueError:
            raise
        except BadRequestError as error:
            self._end(entry, State.FAILED, str(error))
        except CancelledError as error:  # while its ranks were starting
            self._finish(entry, Ended(End.CANCELLED, str(error)))
        except StartError as error:  # its own fault or its ranks': another may do better on the same replica
            self._lose(entry, str(error))
        except JobFailedError as error:  # Ray's
            self._stillborn += 1
            self.problem = f"replica {self.number}: {error}" if self._stillborn >= _RETIRE else ""
            self._lose(entry, str(error), killed=False)
        except Exception as error:
            log.exception("%s: unexpected failure", entry.name)
            self._lose(entry, f"unexpected failure: {error!r}")
        else:
            self._finish(entry, ended)

    def _group_for(self, job: Job) -> RankGroup:
        """The group that it has, if that can do the job; otherwise a new one."""
        if self._group is not None and self._loaded == kind_of(job):
            return self._group
        self.dismiss()
        self._show("starting")
        self._group = RankGroup(
            job.config, job.world, job.degrees, job.timeout, self._pool.pulse, self._is_unwanted
        )
        self._loaded = kind_of(job)
        return self._group

    def _is_unwanted(self) -> bool:
        return bool(self._unwanted) or self._pool.ending

    def _run(self, entry: Entry, job: Job, group: RankGroup) -> Ended:
        progress, left, told = Progress(), TimeLeft([]), 0.0
        for event in group.run(job):
            self._say(entry, event, group)
            if isinstance(event, Ended):
                self._tell(entry, progress)
                return event
            if isinstance(event, Begun):
                progress, left, told = Progress(event.label, steps=len(event.kinds)), TimeLeft(event.kinds), 0
            else:
                left.add(event)
                progress = Progress(progress.label, event.index + 1, progress.steps, left.nfe, left.seconds)
            if self._is_unwanted():
                group.stop()
            if time.monotonic() - told > _TELL:
                told = time.monotonic()
                self._tell(entry, progress)
        raise RuntimeError("a job ended without an end")

    def _say(self, entry: Entry, event: Event | Ended, group: RankGroup) -> None:
        """To whoever listens; who has gone, such as the reader of a pipe, costs nobody a video."""
        try:
            self._on_event(entry, event, group)
        except OSError as error:
            if not self._mute:
                log.warning("nobody is told of replica %d any more: %s", self.number, error)
            self._mute = True

    def _tell(self, entry: Entry, progress: Progress) -> None:
        try:
            self._queue.report(entry.id, progress)
        except QueueError as error:  # how far it is, it will say again
            log.warning("%s", error)
        seconds_left = progress.seconds_left or 0.0
        self._pool.metrics.progress(self.number, progress.step, seconds_left)

    def _finish(self, entry: Entry, ended: Ended) -> None:
        """Write down how it ended."""
        match ended.end:
            case End.DONE:
                self._end(entry, State.DONE)
            case End.REFUSED:
                self._end(entry, State.FAILED, ended.reason)
            case End.CANCELLED if self._unwanted:
                self._end(entry, State.CANCELLED, f"{self._unwanted}; {ended.reason}")
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
        """A request has cost its group (`killed`), or got none."""
        self.dismiss()
        self._restarts += 1
        self._pool.metrics.restarted()
        killed = killed and not self._pool.ending  # the end of the pool is no request's fault
        kills = entry.kills + killed
        if self._unwanted:
            self._end(entry, State.CANCELLED, f"{self._unwanted}; {reason}")
        elif kills >= KILLS:
            self._set_aside(entry, kills, reason)
        else:
            log.warning("%s: %s; it goes on with new ranks", entry.name, reason)
            self._put_back(entry, reason, killed=killed)
        self._show("waiting for a new group")
        self._pool.pause(BACKOFF * 2 ** min(self._failures, 6))
        self._failures += 1

    def _set_aside(self, entry: Entry, kills: int, reason: str) -> None:
        self._end(entry, State.FAILED, f"set aside, as it has cost {kills} rank groups; the last: {reason}")

    def _put_back(self, entry: Entry, reason: str, *, killed: bool) -> None:
        self._kept(lambda: self._queue.put_back(entry.id, reason, killed=killed))

    def _end(self, entry: Entry, state: State, reason: str = "") -> None:
        self._kept(lambda: self._queue.end(entry.id, state, reason))
        self._pool.metrics.ended(state)
        log.info("%s: %s %s", entry.name, state, reason)

    def _show(self, state: str) -> None:
        """For `lockstep status`."""
        places = [] if self._group is None else self._group.places
        told = [{key: place[key] for key in ("rank", "host", "device", "pid")} for place in places]
        try:
            self._queue.show_replica(ReplicaEntry(self.number, state, told, self._restarts))
        except QueueError as error:
            log.warning("%s", error)
