"""Work that the server does beside its answers, again and again, in a thread."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from launch.serve.queue import QueueError

log = logging.getLogger("launch")


class Rounds:
    """Makes rounds in a thread while the server runs; what fails or is interrupted is done by a later one.

    No error ends the rounds: a fault of ours is logged with its traceback, and the next round is made.

    Args:
        name: name of the thread.
        every: seconds from one round to the next.
        work: makes a round.
        delayed: what a warning says of a round that failed.
    """

    def __init__(self, name: str, every: float, work: Callable[[], None], delayed: str):
        self._every, self._work, self._delayed = every, work, delayed
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End after the current round."""
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(self._every):
            try:
                self._work()
            except (OSError, QueueError) as error:
                log.warning("%s: %s", self._delayed, error)
            except Exception:
                log.exception("%s", self._delayed)
