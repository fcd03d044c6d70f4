"""Repeats work of the server in a background thread."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from launch.serve.queue import QueueError

log = logging.getLogger("launch")


class Rounds:
    """Repeats work in a thread while the server runs; a round that fails is made up for by the next.

    No error ends the thread: an unexpected one is logged with its traceback.

    Args:
        name: name of the thread.
        every: seconds from one round to the next.
        work: does one round of work.
        delayed: what the warning about a failed round says.
    """

    def __init__(self, name: str, every: float, work: Callable[[], None], delayed: str):
        self._every, self._work, self._delayed = every, work, delayed
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Make the thread end after the current round."""
        self._over.set()

    def wait(self, seconds: float) -> None:
        """Wait until the thread has ended. A round that takes longer ends with the process."""
        self._thread.join(max(0.0, seconds))

    def _run(self) -> None:
        while not self._over.wait(self._every):
            try:
                self._work()
            except (OSError, QueueError) as error:
                log.warning("%s: %s", self._delayed, error)
            except Exception:
                log.exception("%s", self._delayed)
