"""What checkpoints cost: denoising with and without them, in alternating rounds of one run.

python scripts/bench_checkpoint.py
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import torch

from launch.options import CHECKPOINT_EVERY
from runtime.checkpoint import Checkpoints
from runtime.configs import load_config
from runtime.engine import Engine
from runtime.video import FrameBuffer

GOAL = 0.02  # of denoising time


def measure(rounds: int, every: list[int]) -> dict[int, list[float]]:
    """Denoising seconds by `every`; 0 stands for no checkpoints."""
    engine = Engine(load_config("wan-tiny"))
    request = engine.config.request("a red circle moving left on a black background")
    seconds: dict[int, list[float]] = {count: [] for count in (0, *every)}
    engine.warm_up(request)
    for _ in range(rounds):
        for count, times in seconds.items():
            with tempfile.TemporaryDirectory() as folder:
                checkpoints = Checkpoints(Path(folder), every=count) if count else None
                generation = engine.generate(request, [FrameBuffer()], checkpoints=checkpoints)
                times.append(generation.seconds.denoise)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--every", type=int, nargs="+", default=[1, 2, CHECKPOINT_EVERY])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    seconds = measure(arguments.rounds, sorted(set(arguments.every)))
    base = statistics.median(seconds[0])
    print(f"wan-tiny, 50 steps, 14 computed; medians and least of {arguments.rounds} alternating rounds\n")
    print("| a checkpoint every | median, s | least, s | cost by medians | cost by least |")
    print("| --- | --- | --- | --- | --- |")
    for count, times in seconds.items():
        name = f"{count} computed steps" if count else "never"
        costs = statistics.median(times) / base - 1, min(times) / min(seconds[0]) - 1
        print(f"| {name} | {statistics.median(times):.3f} | {min(times):.3f} |", end=" ")
        print(" | ".join(f"{100 * cost:+.1f} %" for cost in costs), "|")
    print(f"\nGoal: below {100 * GOAL:.0f} % with the default, every {CHECKPOINT_EVERY} computed steps.")


if __name__ == "__main__":
    main()
