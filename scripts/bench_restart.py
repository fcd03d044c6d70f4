"""Seconds until a rank group on Ray is ready again after one of its ranks was killed, against a cold start.

    python scripts/bench_restart.py --gigabytes 4 --ranks 2

The model is wan-tiny with another transformer, as wide as Wan2.1-14B's, written in float32 and loaded in
bfloat16. In each round a first group starts with the files dropped from the kernel's cache; its last rank is
killed in the middle of a job; and a group in its place resumes the job. Told is what each part takes: placing
the ranks and starting their processes (with all imports), meeting and loading, and the first step.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import ray
from bench_loading import drop, write_model

from launch.cluster.group import Begun, Ended, RankGroup
from runtime.checkpoint.folder import Checkpoints
from runtime.jobs.job import Job
from runtime.models.configs import open_config
from runtime.request.config import Config, Dtypes
from runtime.request.outputs import Outputs
from runtime.sampling.denoise import StepRecord

KILLED_AFTER = 2  # steps


class TimedGroup(RankGroup):
    """A rank group that notes when its ranks' processes are there, and when all have loaded the model."""

    def __init__(self, job: Job):
        self.seconds: dict[str, float] = {}
        super().__init__(job)

    def _place(self, job: Job) -> None:
        began = time.perf_counter()
        super()._place(job)
        self.seconds["placing, processes and imports"] = time.perf_counter() - began
        say("  the processes are there")

    def _start(self, job: Job) -> list[dict[str, Any]]:
        began = time.perf_counter()
        found = super()._start(job)
        self.seconds["meeting and loading"] = time.perf_counter() - began
        say("  the model is loaded")
        return found


def job_of(folder: Path, out: Path, ranks: int) -> Job:
    """Job of a small video that every step of which is computed, with a checkpoint after each."""
    config: Config = open_config(None, model=str(folder)).model_copy(
        update={
            "dtype": Dtypes(transformer="bfloat16", text_encoder="float32", vae="float32"),
            "device": "cpu",
        }
    )
    request = config.request(
        "a red circle", width=32, height=32, frames=5, steps=6, max_sequence_length=32, spectrum="off"
    )
    kept = Checkpoints(out / "checkpoints", every=1, resume=True)
    outputs = Outputs(out / "video.mp4", out / "video.json", overwrite=True)
    return Job.build(config, request, outputs, ranks=ranks, checkpoints=kept).absolute()


def steps_of(group: RankGroup, job: Job) -> Iterator[StepRecord | Ended]:
    """Run a job; yields its steps and its end."""
    yield from (event for event in group.run(job) if not isinstance(event, Begun))


def say(doing: str) -> None:
    print(f"{time.strftime('%X')} {doing}", file=sys.stderr, flush=True)


def one_round(folder: Path, ranks: int) -> dict[str, dict[str, float]]:
    """Start, kill and replace a group; seconds of each part, for the first group and the one in its place."""
    with tempfile.TemporaryDirectory() as out:
        say("a cold start")
        job = job_of(folder, Path(out), ranks)
        drop(folder)
        began = time.perf_counter()
        group, found = TimedGroup(job), {}
        loaded = time.perf_counter()
        found["cold start"] = {**group.seconds}
        running = steps_of(group, job)
        for event in running:
            if isinstance(event, StepRecord) and event.index == 0:
                found["cold start"]["the first step"] = time.perf_counter() - loaded
                found["cold start"]["in all"] = time.perf_counter() - began
            if isinstance(event, StepRecord) and event.index == KILLED_AFTER:
                break
        say("killing the last rank")
        killed = time.perf_counter()
        os.kill(group.places[-1]["pid"], signal.SIGKILL)
        ended = [event for event in running if isinstance(event, Ended)]
        noticed = time.perf_counter()
        assert ended and "rank" in ended[0].reason, ended
        group.kill()
        say("a group in its place")
        again = TimedGroup(job)
        loaded = time.perf_counter()
        parts = {"until it is noticed": noticed - killed, **again.seconds}
        with closing(steps_of(again, job)) as running:
            for event in running:
                if isinstance(event, Ended):
                    assert event.report, event.reason
                elif "the first step" not in parts:
                    assert event.index > 0, "it does not resume"
                    parts["the first step"] = time.perf_counter() - loaded
                    parts["in all"] = time.perf_counter() - killed
        again.kill()
        found["after a rank was killed"] = parts
        return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=4.0, help="of the checkpoint in float32")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to write the model; by default a temporary one")
    arguments = parser.parse_args()
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        size = write_model(Path(folder), arguments.gigabytes)
        ray.init(address="local", num_cpus=arguments.ranks, include_dashboard=False)
        try:
            for _ in range(arguments.rounds):
                for what, parts in one_round(Path(folder), arguments.ranks).items():
                    for part, seconds in parts.items():
                        found[what][part].append(seconds)
        finally:
            ray.shutdown()
    parts = ["until it is noticed", *found["cold start"]]
    print(
        f"{size:.1f} GB in float32, {arguments.ranks} ranks, medians of {arguments.rounds} rounds, seconds\n"
    )
    print(f"| | {' | '.join(parts)} |\n|{' --- |' * (len(parts) + 1)}")
    for what, seconds in found.items():
        cells = (f"{statistics.median(seconds[part]):.1f}" if part in seconds else "" for part in parts)
        print(f"| {what} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
