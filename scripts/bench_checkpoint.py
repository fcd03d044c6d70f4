"""Cost of checkpoints: delay of the denoising loop, load of the writing thread, and denoising with and
without them in alternating rounds.

python scripts/bench_checkpoint.py
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from runtime.checkpoint.folder import Checkpoints
from runtime.checkpoint.writer import CheckpointWriter
from runtime.engine import Engine
from runtime.jobs.defaults import CHECKPOINT_EVERY
from runtime.media.mp4 import FrameBuffer
from runtime.request.config import load_config
from runtime.sampling.resume import Resumable

GOAL = 0.02  # of denoising time


@dataclass
class Clock:
    """Seconds spent on checkpoints.

    Attributes:
        held: wall time by which the denoising loop was delayed, including the writing of the last checkpoint.
        busy: CPU time of the writing threads, which run beside the loop.
    """

    held: float = 0.0
    busy: float = 0.0


@contextmanager
def clocked() -> Iterator[Clock]:
    """Measure the time that is spent on checkpoints within the context."""
    clock = Clock()
    patched = [
        (Resumable, "after", "held", time.perf_counter),
        (Resumable, "finish", "held", time.perf_counter),
        (CheckpointWriter, "_write", "busy", time.thread_time),
    ]
    originals = [(owner, name, getattr(owner, name)) for owner, name, _, _ in patched]

    def timed(original: Any, total: str, now: Any) -> Any:
        def call(*args: Any) -> Any:
            started = now()
            try:
                return original(*args)
            finally:
                setattr(clock, total, getattr(clock, total) + now() - started)

        return call

    for owner, name, total, now in patched:
        setattr(owner, name, timed(getattr(owner, name), total, now))
    try:
        yield clock
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


@dataclass
class Round:
    """One generation: seconds of denoising, and how many of them checkpoints took."""

    denoise: float
    held: float
    busy: float


def measure(rounds: int, every: list[int]) -> dict[int, list[Round]]:
    """Measure generations, by `every`; 0 stands for no checkpoints."""
    engine = Engine(load_config("wan-tiny"))
    request = engine.config.request("a red circle moving left on a black background")
    results: dict[int, list[Round]] = {count: [] for count in (0, *every)}
    engine.warm_up(engine.plan(request.full))
    for _ in range(rounds):
        for count, done in results.items():
            with tempfile.TemporaryDirectory() as folder, clocked() as clock:
                checkpoints = Checkpoints(Path(folder), every=count) if count else None
                result = engine.generate(request, [FrameBuffer()], checkpoints=checkpoints)
                done.append(Round(result.seconds.denoise, clock.held, clock.busy))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--every", type=int, nargs="+", default=[1, 2, CHECKPOINT_EVERY])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = measure(arguments.rounds, sorted(set(arguments.every)))
    base = statistics.median(one.denoise for one in results[0])
    print(f"wan-tiny, 50 steps, 14 computed; medians of {arguments.rounds} alternating rounds\n")
    print("| a checkpoint every | denoising, s | the loop is held up | writing thread, CPU | against never |")
    print("| --- | --- | --- | --- | --- |")
    for count, done in results.items():
        name = f"{count} computed steps" if count else "never"
        seconds, held, busy = (
            statistics.median(getattr(one, field) for one in done) for field in ("denoise", "held", "busy")
        )
        print(
            f"| {name} | {seconds:.3f} | {100 * held / seconds:.2f} % | {100 * busy / seconds:.2f} % "
            f"| {100 * (seconds / base - 1):+.1f} % |"
        )
    print(
        f"\nGoal: the loop held up less than {100 * GOAL:.0f} % with the default, every {CHECKPOINT_EVERY}."
    )


if __name__ == "__main__":
    main()
