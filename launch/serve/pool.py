"""Replicas that serve a queue: K rank groups, each at one request at a time, replaced when they die.

What a storyboard, a server or `lockstep queue run` stands on. The queue is on disk: a pool may be killed, and
another one goes on where it was.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from launch.cluster.metrics import DriverMetrics
from launch.serve.entries import Entry, State
from launch.serve.queue import Queue, QueueError
from launch.serve.replica import BACKOFF, KILLS, LOOK, OnEvent, Replica
from launch.shell.pulse import Pulse
from runtime.errors import JobFailedError

__all__ = ["BACKOFF", "KILLS", "OnEvent", "Replica", "ReplicaPool"]

log = logging.getLogger("launch")


class ReplicaPool:
    """K replicas that do what is in a queue.

    Args:
        queue: served by nobody else meanwhile.
        replicas: how many; each takes the ranks of the request that it is at.
        on_event: told of what happens, in the replica's thread, with the request and the group at work on it.
        pulse: see `RankGroup`.
        advice: how a request whose checkpoints are kept goes on; told with the reason for which it ended.
        look: called when ranks have died, before their request is blamed. Does not return where it was Ray.

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
        look: Callable[[], None] = lambda: None,
        advice: Callable[[Entry], str] = lambda entry: "",
    ) -> None:
        self._queue, self._ending, self.metrics = queue, threading.Event(), DriverMetrics()
        self.pulse, self.look, self.advice, self._problem = pulse, look, advice, ""
        self.largest = 0  # ranks of the largest group that has come up
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
                        thread.join(LOOK)
            except BaseException:
                self._ending.set()
                for replica in self._replicas:
                    replica.dismiss()
                for thread in threads:
                    thread.join(2 * LOOK)
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
            while not over.wait(LOOK):
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
