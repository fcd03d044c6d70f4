"""Runs a pool of replicas for the server's queue, in a process of its own that is replaced when it ends.

Only one pool serves a queue: if another process does, this one waits until it is gone.
"""

from __future__ import annotations

import logging
import signal
import subprocess
import threading
import time
from collections.abc import Mapping

from launch.serve.queue import Queue, QueueError
from launch.shell.tied import tied
from runtime.errors import BadRequestError, reason
from runtime.files.interpreter import interpreter

log = logging.getLogger("launch")

_STDERR = 2
_LOOK = 0.3  # seconds between two looks whether the pool has ended
_ASK = 2.0  # seconds between two looks whether another process still serves the queue
_LONGEST = 60.0  # seconds before a pool that ends at once is started again; 1, 2, 4 … before
_PATIENCE = 60.0  # seconds for the pool to stop after a step
_LEAVING = 30.0  # seconds for it to end at once


class PoolKeeper:
    """Keeps a pool of replicas running on a queue.

    Args:
        queue: an existing queue.
        replicas: number of replicas; 0 to leave the queue to a pool that others start.
        ranks: ranks that make a video together.
        environment: environment of the pool's process; by default that of this process.
    """

    def __init__(self, queue: Queue, replicas: int, ranks: int, environment: Mapping[str, str] | None = None):
        self._queue, self._replicas, self._ranks = queue, replicas, ranks
        self._environment = environment
        self._over, self._hurry = threading.Event(), threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._ended = ""  # why there is no pool; empty while there is one, or while one starts
        self._thread = threading.Thread(target=self._keep, name="pool-keeper", daemon=True)

    def start(self) -> None:
        """Start the thread that keeps a pool running."""
        self._thread.start()

    def problem(self) -> str:
        """Reason why no replica can begin with a request now; empty if one can."""
        if self._ended:
            return self._ended
        states = [replica.state for replica in self._queue.replicas()]
        if not states:
            return "no replicas yet: the pool is starting, or nobody serves the queue"
        return "" if any(state != "gone" for state in states) else "all replicas are gone"

    def hurry(self) -> None:
        """Make `stop` end the pool at once instead of after a step."""
        self._hurry.set()

    def stop(self) -> None:
        """Stop the pool after a step; running requests wait in the queue, with checkpoints to resume from."""
        self._over.set()
        while self._thread.is_alive():  # a join without a timeout would block signals
            self._thread.join(_LOOK)

    def _keep(self) -> None:
        failures = 0
        while not self._over.is_set():
            if not self._free():
                self._over.wait(_ASK)
                continue
            started = time.monotonic()
            try:
                end = f"ended with exit code {self._serve()}"
            except OSError as error:  # no memory or process is left for it
                end = f"cannot be started ({reason(error)})"
            if self._over.is_set():
                return
            failures = 1 if time.monotonic() - started > _LONGEST else failures + 1
            pause = min(2.0 ** (failures - 1), _LONGEST)
            self._ended = f"the pool {end} and is started again within {pause:.0f} s"
            log.warning("%s", self._ended)
            self._over.wait(pause)

    def _free(self) -> bool:
        """Whether a pool is to be started. What an earlier one was running waits again from then on."""
        try:
            with self._queue.served():
                pass
        except BadRequestError:  # another process serves it
            self._ended = ""
            return False
        except QueueError as error:
            self._ended = str(error)
            return False
        if not self._replicas:
            self._ended = "nobody serves the queue"
        return bool(self._replicas)

    def _serve(self) -> int:
        """Run a pool until it ends; returns its exit code."""
        self._ended = ""
        options = {
            "--queue": str(self._queue.folder.absolute()),
            "--replicas": str(self._replicas),
            "--ranks": str(self._ranks),
        }
        command = [*interpreter(), "-m", "launch", "queue", "run", "--keep", "--previews"]
        command += [word for option in options.items() for word in option]
        with subprocess.Popen(
            tied(command),
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=_STDERR,
            start_new_session=True,  # a terminal's Ctrl-C is for the server, which stops the pool
        ) as process:
            self._process = process
            while process.poll() is None:
                if self._over.wait(_LOOK):
                    self._end(process)
            return process.wait()

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        """Stop a pool: after a step, at once, or, if it does not listen, by its keeper."""
        for patience in (_PATIENCE, _LEAVING):
            process.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + patience
            while time.monotonic() < deadline:
                if process.poll() is not None:
                    return
                if patience == _PATIENCE and self._hurry.wait(_LOOK):
                    break
                time.sleep(_LOOK / 10)
        process.kill()
