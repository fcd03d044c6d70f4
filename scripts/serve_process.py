"""`lockstep serve` as a process that scripts start, kill and start again on one queue."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import IO

import httpx
from chaos_watch import MARKER, Member, members, wait_for_end

from launch.serve.queue import Queue
from launch.shell.tied import tied

_ROOT = Path(__file__).resolve().parent.parent
_START, _END = 900.0, 180.0  # seconds for it to answer, and to end
_LOOK = 0.02  # seconds


class ServeProcess:
    """A server on the queue in `folder`, which belongs to it; `serving` ends it.

    It is told to end when the thread that started it does, even if this process is killed.

    Attributes:
        url: its address, which stays the same however often it is started.
        starts: how often it was started.
    """

    def __init__(self, folder: Path, options: Sequence[str] = ()):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.queue = folder, folder / "queue"
        self._options, self._port, self.starts = list(options), "0", 0
        self._mark, self._log = uuid.uuid4().hex, (folder / "server.log").open("ab")
        self._process: subprocess.Popen[bytes] | None = None
        self.url = ""

    def start(self) -> float:
        """Start it; returns the seconds until it answers."""
        command = [sys.executable, "-m", "launch", "serve", "--queue", str(self.queue), "--port", self._port]
        env = os.environ | {MARKER: self._mark, "PYTHONPATH": str(_ROOT)}
        env.pop("RAY_ADDRESS", None)
        started, self.starts = time.monotonic(), self.starts + 1
        log: IO[bytes] = self._log
        self._process = subprocess.Popen(
            tied([*command, *self._options]), cwd=self.folder, env=env, stdout=subprocess.PIPE, stderr=log
        )
        assert self._process.stdout is not None
        self.url = self._process.stdout.readline().decode().strip()
        if not self.url:
            raise RuntimeError(f"the server did not start; see {self._log.name}")
        self._port = self.url.rpartition(":")[2]
        return time.monotonic() - started

    def wait_ready(self, seconds: float = _START) -> float:
        """Wait until a replica could begin with a request; returns how long that took."""
        started = time.monotonic()
        with httpx.Client(base_url=self.url, timeout=10) as client:
            while time.monotonic() - started < seconds:
                with suppress(httpx.HTTPError):
                    if client.get("/readyz").status_code == 200:
                        return time.monotonic() - started
                time.sleep(_LOOK)
        raise RuntimeError(f"the server was not ready within {seconds:g} s; see {self._log.name}")

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send it a signal, and wait for its end; returns its exit code."""
        assert self._process is not None
        self._process.send_signal(number)
        try:
            with self._process as process:
                return process.wait(_END)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    @property
    def running(self) -> bool:
        """Whether it runs."""
        return self._process is not None and self._process.poll() is None

    def ranks(self) -> list[int]:
        """Process ids of the ranks that serve its queue."""
        with closing(Queue(self.queue)) as queue:
            return [place["pid"] for replica in queue.replicas() for place in replica.places]

    def steps(self) -> int:
        """Number of the last event that told of a step."""
        last = "SELECT MAX(seq) FROM events WHERE kind = 'step'"
        with closing(Queue(self.queue)) as queue:
            return queue.read(lambda row: int(row[0] or 0), last)[0]

    def left(self, seconds: float = 0.0) -> list[Member]:
        """Processes that it has started and that still run after so many seconds."""
        return wait_for_end(self.folder, self._mark, os.getpid(), seconds)[0]

    def pools(self) -> list[int]:
        """Process ids of its pool: the driver of Ray, and what replaces that when Ray is lost."""
        own = -1 if self._process is None else self._process.pid
        return [one.pid for one in members(self.folder, self._mark, own) if " queue run " in one.command]


@contextmanager
def serving(folder: Path, options: Sequence[str] = ()) -> Iterator[ServeProcess]:
    """A server, started and ended."""
    server = ServeProcess(folder, options)
    server.start()
    try:
        yield server
    finally:
        if server.running:
            server.end()
        for member in server.left(10.0):
            with suppress(ProcessLookupError):
                os.kill(member.pid, signal.SIGKILL)
