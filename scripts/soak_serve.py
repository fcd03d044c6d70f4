"""Soak `lockstep serve`: many clients, a third of whose jobs misbehave, and a server that is killed.

    python scripts/soak_serve.py --jobs 300 --clients 8 --folder out/soak --out out/soak.md

A third of the jobs are malformed, broken off, cancelled, deleted or sent twice. Meanwhile, at random moments,
the server, a rank or the pool's driver gets SIGKILL, or the server SIGTERM, and the server is started again.
Jobs are functions of `--seed` and their number; moments of the faults are random.

Checks:
* a malformed request is refused (4xx), and one that breaks off leaves no video;
* a request that is sent twice, or again after the server died, is one video, by its Idempotency-Key;
* each accepted video ends once, as its client is told: completed, cancelled, deleted, or failed if its ranks
  or their driver were killed twice; none is made twice, and there is none that no client was told of;
* videos of the same request have the same frames, to the bit, however often they were resumed;
* in the end no process, no checkpoint, no preview and no folder of a deleted video is left.

The folder keeps the queue and the log: a soak that is interrupted is continued by the same command. A folder
whose soak is over is checked again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from serve_process import ServeProcess, serving
from soak_checks import broken_promises, different_bits
from soak_clients import Client, Outcome

FAULTS = ("server", "rank", "driver", "stop")
_WEIGHTS = (4, 4, 1, 1)
_WORKING = 0.8  # share of the faults that come when a video is being made
_SETTLE = 60.0  # seconds for the server to clear up when all jobs are done
_GRACE = 30.0  # seconds for what the server has started to end after it


class Soak:
    """One soak in its folder.

    Attributes:
        outcomes: of the jobs that are done, by number.
        faults: how often there was each.
    """

    def __init__(self, folder: Path, seed: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self._seed, self._path = folder, seed, folder / "log.jsonl"
        self.outcomes: dict[int, Outcome] = {}
        self.faults: Counter[str] = Counter()
        self.seconds = 0.0
        self._lock, self._steps = threading.Lock(), 0
        for line in self._path.read_text("utf-8").splitlines() if self._path.exists() else ():
            self._take(json.loads(line))

    def run(self, jobs: int, clients: int, pause: float, most: int) -> list[str]:
        """Carry out what is not done yet; returns the broken promises of the whole soak.

        Args:
            pause: mean seconds from the first step after a fault to the next.
            most: number of faults, at most.
        """
        started, before = time.monotonic(), self.faults.total()
        left = [number for number in range(jobs) if number not in self.outcomes]
        with serving(self.folder) as server:
            server.wait_ready()
            with ThreadPoolExecutor(clients) as pool:
                client = Client(server.url, self._seed)
                done = [pool.submit(self._do, client, number) for number in left]
                while self.faults.total() - before < most and not all(one.done() for one in done):
                    self._disturb(server, pause, lambda: all(one.done() for one in done))
            for one in done:
                one.result()
            self._settle()
            code = server.end()
            ended = [] if code == 0 else [f"server: its exit code was {code}"]
            ended += [f"{member}: it outlived the server" for member in server.left(_GRACE)]
        self._note({"seconds": round(time.monotonic() - started, 1)})
        return [*ended, *self.problems()]

    def _settle(self) -> None:
        """Wait until the server has cleared up what was deleted last."""
        until = time.monotonic() + _SETTLE
        while self.problems() and time.monotonic() < until:
            time.sleep(1)

    def problems(self) -> list[str]:
        """Promises that were broken, as far as that can be seen now."""
        outcomes = list(self.outcomes.values())
        own = [f"job {one.number} ({one.kind}): {said}" for one in outcomes for said in one.problems]
        accepted = {id: one.end for one in outcomes for id in one.accepted}
        made = [(one.asked, one.accepted[0], one.digest) for one in outcomes if one.digest]
        return [*own, *broken_promises(self.folder / "queue", accepted), *different_bits(made)]

    def _do(self, client: Client, number: int) -> None:
        self._note(asdict(client.carry_out(number)))

    def _disturb(self, server: ServeProcess, pause: float, over: Callable[[], bool]) -> None:
        """Wait for a random time, mostly from when a video is being made, and do one random thing."""
        if random.random() < _WORKING:
            _sleep(lambda: over() or server.steps() > self._steps)
        until = time.monotonic() + random.expovariate(1 / pause)
        _sleep(lambda: over() or time.monotonic() > until)
        if over():
            return
        [fault] = random.choices(FAULTS, _WEIGHTS)
        match fault:
            case "server" | "stop":
                server.end(signal.SIGKILL if fault == "server" else signal.SIGTERM)
                time.sleep(random.uniform(0, 2))
                server.start()
            case "rank":
                if not _kill(server.ranks()):
                    return
            case "driver":
                if not _kill(server.pools()):
                    return
        self._note({"fault": fault, "at": time.time()})
        self._steps = server.steps()

    def _note(self, told: dict[str, Any]) -> None:
        with self._lock:
            self._take(told)
            with self._path.open("a", encoding="utf-8") as log:
                log.write(json.dumps(told) + "\n")

    def _take(self, told: dict[str, Any]) -> None:
        if "number" in told:
            self.outcomes[told["number"]] = Outcome(**told)
        elif "fault" in told:
            self.faults[told["fault"]] += 1
        else:
            self.seconds += told["seconds"]


def _sleep(until: Callable[[], bool]) -> None:
    while not until():
        time.sleep(0.2)


def _kill(processes: Iterable[int]) -> bool:
    """Kill one of several processes; returns whether there was one."""
    found = list(processes)
    if not found:
        return False
    with suppress(ProcessLookupError):
        os.kill(random.choice(found), signal.SIGKILL)
    return True


def table(soak: Soak, problems: Sequence[str]) -> str:
    """The result as Markdown."""
    outcomes = list(soak.outcomes.values())
    ends = ("completed", "cancelled", "deleted", "failed", "refused")
    rows = [
        "| jobs | " + " | ".join(ends) + " |",
        "| --- " * (1 + len(ends)) + "|",
    ]
    for kind in dict.fromkeys(["plain", *sorted({one.kind for one in outcomes})]):
        of_kind = Counter(one.end for one in outcomes if one.kind == kind)
        rows.append(f"| {of_kind.total()} {kind} | " + " | ".join(str(of_kind[end]) for end in ends) + " |")
    faults = ", ".join(f"{fault} {soak.faults[fault]}" for fault in FAULTS)
    videos = sum(len(one.accepted) for one in outcomes)
    said = f"{len(outcomes)} jobs, {videos} videos, {soak.seconds:.0f} s. Faults: {faults}."
    said += f" Broken promises: {len(problems)}."
    return "\n".join([*rows, "", said, *(f"- {problem}" for problem in problems), ""])


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--jobs", type=int, default=300, help="default 300")
    parser.add_argument("--clients", type=int, default=8, help="at a time; default 8")
    parser.add_argument("--pause", type=float, default=20.0, help="mean seconds to a fault; default 20")
    parser.add_argument("--faults", type=int, default=10**9, help="at most so many; default no bound")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("out/soak"), help="of the queue and the log")
    parser.add_argument("--out", type=Path, help="file for the table")
    given = parser.parse_args(words)
    soak = Soak(given.folder.absolute(), given.seed)
    problems = soak.run(given.jobs, given.clients, given.pause, given.faults)
    told = table(soak, problems)
    sys.stdout.write(told)
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(told, encoding="utf-8")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
