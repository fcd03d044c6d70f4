"""Measure `lockstep serve` on wan-tiny: answers under load, beginning, cancelling, and starting again.

    python scripts/bench_serve.py --queued 1000 --clients 4 --out out/serve.md

The server, its pool, Ray and the clients share this machine. While answers are measured, the pool makes a
video, and the other requests wait:

* creating, retrieving (at random) and listing (20 a page): answers a second, and how long one takes;
* a warm replica: from sending a request to the event that tells of its first step;
* DELETE of a video that is being made, until the replica has begun with the next one;
* SIGKILL with all these requests in the queue: until the server answers again, until it is ready, and until
  the video that was being made goes on.

Everything but a warm replica's beginning is measured with a full queue. Prints a table, in seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from serve_process import ServeProcess, serving

from launch.serve.queue import Queue

_SMALL = {"prompt": "a red circle moving left", "size": "64x48", "frames": 5, "spectrum": "off"}
_LONG = {**_SMALL, "size": "96x96", "frames": 17, "steps": 200}
_PATIENCE = 600.0  # seconds


@dataclass(slots=True)
class Answers:
    """Answers to requests of one kind, from several clients.

    Attributes:
        seconds: that each took.
        wall: seconds from the first request to the last answer.
    """

    name: str
    seconds: list[float] = field(default_factory=list)
    wall: float = 0.0

    @property
    def row(self) -> str:
        """Row of the table of answers."""
        p50, p99 = np.percentile(self.seconds, [50, 99])
        rate = len(self.seconds) / self.wall
        return f"| {self.name} | {len(self.seconds)} | {rate:.0f} | {1000 * p50:.1f} | {1000 * p99:.1f} |"


@dataclass(slots=True)
class Waits:
    """Something that was waited for, several times; in seconds."""

    name: str
    seconds: list[float] = field(default_factory=list)

    @property
    def row(self) -> str:
        """Row of the table of waits."""
        found = self.seconds
        return f"| {self.name} | {len(found)} | {statistics.median(found):.2f} | {max(found):.2f} |"


class Bench:
    """Measures one server.

    Attributes:
        clients: number of clients that ask at a time.
        answers, waits: what was measured so far.
    """

    def __init__(self, clients: int, seed: int):
        self.clients, self._random = clients, random.Random(seed)
        self.answers: list[Answers] = []
        self.waits: list[Waits] = []

    def run(self, server: ServeProcess, queued: int, seconds: float, repeats: int) -> None:
        """Measure everything.

        Args:
            server: the server, which is ready.
            queued: requests in the queue while answers are measured.
            seconds: for which retrieving and listing are measured, each.
            repeats: how often waits are measured.
        """
        soon = httpx.Limits(keepalive_expiry=2)  # before the server closes a connection that is not used
        with httpx.Client(base_url=server.url, timeout=60, limits=soon) as client:
            self._server, self._client = server, client
            self._measure(queued, seconds, repeats)

    def _measure(self, queued: int, seconds: float, repeats: int) -> None:
        self._begin(repeats)
        running = self._create(_LONG)
        with self._followed(running) as events:
            _until(events, "step")
        ids = self._fill(queued - 2)  # beside the one that runs and the one that follows it
        self._load("retrieve", seconds, lambda client: client.get(f"/v1/videos/{self._random.choice(ids)}"))
        self._load("list", seconds, lambda client: client.get("/v1/videos"))
        self._restart(self._free(running, repeats))

    def _begin(self, repeats: int) -> None:
        self._ended(self._create({**_SMALL, "steps": 2}))  # the replica has loaded the model from here on
        begun, first = Waits("create → begun, warm replica"), Waits("create → first step seen, warm replica")
        for _ in range(repeats):
            started = time.monotonic()
            id = self._create({**_SMALL, "steps": 8})
            with self._followed(id) as events:
                _until(events, "begun")
                begun.seconds.append(time.monotonic() - started)
                _until(events, "step")
                first.seconds.append(time.monotonic() - started)
            self._ended(id)
        self.waits += [begun, first]

    def _fill(self, count: int) -> list[str]:
        """Create requests that wait, from all clients at once."""
        ids: list[str] = []

        def create(client: httpx.Client) -> httpx.Response:
            answer = client.post("/v1/videos", json={**_SMALL, "steps": 4, "priority": -1})
            ids.append(answer.raise_for_status().json()["id"])
            return answer

        self._load("create", 0.0, create, count)
        return ids

    def _load(
        self, name: str, seconds: float, ask: Callable[[httpx.Client], httpx.Response], count: int = 0
    ) -> None:
        """Ask from all clients at once: `count` times together, or for so many seconds."""
        answers, left = Answers(name), iter(range(count)) if count else None
        started = time.monotonic()

        def work() -> None:
            with httpx.Client(base_url=self._server.url, timeout=60) as client:
                while next(left, None) is not None if left else time.monotonic() - started < seconds:
                    begun = time.monotonic()
                    ask(client).raise_for_status()
                    answers.seconds.append(time.monotonic() - begun)

        threads = [threading.Thread(target=work) for _ in range(self.clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        answers.wall = time.monotonic() - started
        self.answers.append(answers)

    def _restart(self, running: str) -> None:
        self._server.end(signal.SIGKILL)
        killed = time.time()
        with closing(Queue(self._server.queue)) as queue:
            last = queue.last_event()
        answers = self._server.start()
        ready = answers + self._server.wait_ready()
        with self._followed(running, after=last) as events:
            _until(events, "begun")  # the pool that ended with the server may have told of another step
            resumed = _until(events, "step") - killed
        self.waits += [
            Waits("started again → answers", [answers]),
            Waits("started again → ready", [ready]),
            Waits("killed → the video goes on", [resumed]),
        ]

    def _free(self, running: str, repeats: int) -> str:
        """Delete what is being made, and wait until the replica has begun with the next request.

        Returns:
            The last one, which is being made.
        """
        free = Waits("DELETE of a video → the next one has begun")
        for _ in range(repeats):
            following = self._create({**_LONG, "priority": 1})
            with self._followed(following) as events:
                started = time.monotonic()
                self._ask("DELETE", f"/v1/videos/{running}")
                _until(events, "begun")
                free.seconds.append(time.monotonic() - started)
                _until(events, "step")
            running = following
        self.waits.append(free)
        return running

    def _create(self, asked: dict[str, Any]) -> str:
        return str(self._ask("POST", "/v1/videos", json=asked)["id"])

    def _ended(self, id: str) -> None:
        with self._followed(id) as events:
            deque(events, maxlen=0)

    def _ask(self, method: str, path: str, **more: Any) -> dict[str, Any]:
        answer = self._client.request(method, path, **more)
        told: dict[str, Any] = answer.raise_for_status().json()
        return told

    @contextmanager
    def _followed(self, id: str, after: int = 0) -> Iterator[Iterator[tuple[str, float]]]:
        """Kinds of a video's events, and when they were noted, as they come."""
        path = f"/v1/videos/{id}/events"
        with self._client.stream("GET", path, params={"after": after}, timeout=_PATIENCE) as answer:
            yield _events(answer.raise_for_status().iter_lines())


def _events(lines: Iterator[str]) -> Iterator[tuple[str, float]]:
    """Kind and time of each event of a stream."""
    kind = ""
    for line in lines:
        if line.startswith("event: "):
            kind = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield kind, json.loads(line.removeprefix("data: "))["at"]


def _until(events: Iterator[tuple[str, float]], wanted: str) -> float:
    """Wait for the next event of a kind; returns when it was noted, in seconds since the epoch."""
    for kind, at in events:
        if kind == wanted:
            return at
    raise RuntimeError(f"a video ended before its event {wanted!r}")


def table(bench: Bench, machine: str) -> str:
    """The results as Markdown."""
    return "\n".join(
        [
            "| request | answers | per second | p50, ms | p99, ms |",
            "| --- | --- | --- | --- | --- |",
            *(one.row for one in bench.answers),
            "",
            "| | times | median, s | longest, s |",
            "| --- | --- | --- | --- |",
            *(one.row for one in bench.waits),
            "",
            machine,
            "",
        ]
    )


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--queued", type=int, default=1000, help="requests in the queue; default 1000")
    parser.add_argument("--clients", type=int, default=4, help="clients at a time; default 4")
    parser.add_argument("--seconds", type=float, default=20.0, help="per kind of answer; default 20")
    parser.add_argument("--repeats", type=int, default=10, help="of each wait; default 10")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="file for the tables")
    given = parser.parse_args(words)
    folder = Path(tempfile.mkdtemp(prefix="serve-"))
    bench = Bench(given.clients, given.seed)
    try:
        with serving(folder) as server:
            server.wait_ready()
            bench.run(server, given.queued, given.seconds, given.repeats)
    finally:  # what was measured until then
        shutil.rmtree(folder, ignore_errors=True)
        _tell(bench, given.queued, given.out)
    return 0


def _tell(bench: Bench, queued: int, out: Path | None) -> None:
    load = ", ".join(f"{one:.1f}" for one in os.getloadavg())
    machine = f"{os.cpu_count()} cores, {bench.clients} clients, {queued} requests in the queue; load {load}"
    told = table(bench, machine)
    sys.stdout.write(told)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(told, encoding="utf-8")
        found = {one.name: one.seconds for one in (*bench.answers, *bench.waits)}
        out.with_suffix(".json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
