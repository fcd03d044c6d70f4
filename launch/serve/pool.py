"""Replicas that serve a queue: K rank groups, each running one request at a time, replaced when they die.

Storyboards and `lockstep queue run` are built on it. The queue is on disk: a pool may be killed, and the next
one resumes where it was.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

from launch.cluster.metrics import DriverMetrics
from launch.serve.entries import Entry, State
from launch.serve.previews import RequestPreviews
from launch.serve.queue import Queue, QueueError
from launch.serve.replica import BACKOFF, KILLS, LOOK, OnEvent, Replica
from launch.shell.pulse import Pulse
from runtime.errors import JobFailedError, named

__all__ = ["BACKOFF", "KILLS", "OnEvent", "Replica", "ReplicaPool"]

log = logging.getLogger("launch")


class ReplicaPool:
    """K replicas that run the requests of a queue.

    Args:
        queue: served by no other pool meanwhile.
        replicas: number of replicas; each takes as many ranks as its current request needs.
        on_event: called in the replica's thread with the request, the event and the rank group.
        pulse: see `RankGroup`.
        advice: returns how to resume a request whose checkpoints are kept; added to the reason for its end.
        previews: keep a preview of each running request in the queue's folder `previews`.
        look: called when ranks have died, before the request is blamed. Does not return if Ray was lost.

    Example:
        >>> import ray
        >>> from pathlib import Path
        >>> ray.init()  # doctest: +SKIP
        >>> ReplicaPool(Queue(Path("films")), replicas=2).run()  # doctest: +SKIP
    """

    def __init__(
        self,
        queue: Queue,
        replicas: int,
        on_event: OnEvent = lambda entry, event, group: None,
        pulse: Pulse | None = None,
        look: Callable[[], None] = lambda: None,
        advice: Callable[[Entry], str] = lambda entry: "",
        previews: bool = False,
    ) -> None:
        self._queue, self._ending, self.metrics = queue, threading.Event(), DriverMetrics()
        self.pulse, self.look, self.advice, self._problem = pulse, look, advice, ""
        self.previews = RequestPreviews(queue.folder) if previews else None
        self.largest = 0  # ranks of the largest group that has started
        self._replicas = [Replica(number, queue, self, on_event) for number in range(replicas)]
        self._keep = False

    def run(self, *, keep: bool = False, again: bool = False) -> None:
        """Serve the queue until it is empty, or until `stop`.

        Args:
            keep: wait for more when it is empty.
            again: an earlier driver served it and its Ray was lost, perhaps because of one of its requests.

        Raises:
            BadRequestError: another pool serves the queue.
            JobFailedError: no replica is left, or the queue became unusable; waiting requests keep waiting.
        """
        self._keep = keep
        kept = nullcontext() if self.previews is None else self.previews.kept()
        with self._queue.served(lost=again), kept, self._watched():
            threads = [
                threading.Thread(target=replica.serve, name=f"replica-{replica.number}", daemon=True)
                for replica in self._replicas
            ]
            for thread in threads:
                thread.start()
            try:
                for thread in threads:
                    while thread.is_alive():  # a join without a timeout would block signals
                        thread.join(LOOK)
            except BaseException:
                self._ending.set()
                for replica in self._replicas:
                    replica.dismiss()
                for thread in threads:
                    thread.join(2 * LOOK)
                raise
        if self._problem:
            raise JobFailedError(f"{self._problem}; the remaining requests wait in the queue")
        gone = [replica.problem for replica in self._replicas if replica.problem]
        if len(gone) == len(self._replicas):
            raise JobFailedError(f"no replica is left: {gone[0]}; waiting requests stay in the queue")

    def fail(self, problem: str) -> None:
        """Stop because of a problem with the queue: no further result could be recorded."""
        self._problem = self._problem or problem
        self.stop()

    def stop(self) -> bool:
        """Stop after a step; running requests wait again, with checkpoints to resume from. Returns True."""
        self._ending.set()
        for replica in self._replicas:
            replica.stop()
        return True

    @property
    def ending(self) -> bool:
        """Whether the pool was told to stop."""
        return self._ending.is_set()

    def pause(self, seconds: float) -> None:
        """Sleep, but wake up when the pool is told to stop."""
        self._ending.wait(seconds)

    @property
    def idle(self) -> bool:
        """Whether no work is left: no request waits, and none is running that might wait again."""
        at_work = any(replica.busy for replica in self._replicas)  # read before the queue is
        return not self._keep and not at_work and not self._queue.count()[State.WAITING]

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Enforce deadlines and cancellations in a thread while the block runs."""
        over = threading.Event()

        def watch() -> None:
            while not over.wait(LOOK):
                try:
                    self._look()
                except QueueError as error:
                    log.warning("deadlines and cancellations are delayed: %s", error)
                except BaseException as error:  # SystemExit, too, with which Ray may end a thread
                    log.exception("the pool stops")
                    self.fail(f"deadlines and cancellations cannot be enforced: {named(error)}")
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
