"""Memory of a long video: one window, ten windows, and the same video without windows.

    python scripts/bench_windows.py

Each video is made in a process of its own, up to its mp4. Prints a line for each: the process's peak (VmHWM)
above the loaded model, and its ratio to that of one window.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from runtime.engine import Engine
from runtime.media.mp4 import mp4_writer
from runtime.request.config import Config, load_config

PROMPT = "a red circle moving left on a black background"
STREAMS = ("guided", "feature")


def memory_megabytes(kind: str) -> float:
    """Memory of this process: `VmRSS` is the current size, `VmHWM` the peak."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(kind)) / 1024


def measure(config: Config, frames: int, size: int, steps: int, stream: str) -> dict[str, float]:
    """Make one video of so many frames, and say what it took."""
    with tempfile.TemporaryDirectory() as folder:
        preset = Path(folder) / "preset.yaml"
        preset.write_text(f"stream: {stream}\nschedule: {{kind: paper}}\n")
        engine = Engine(config)
        loaded = memory_megabytes("VmRSS")
        request = config.request(
            PROMPT, frames=frames, width=size, height=size, steps=steps, spectrum=str(preset)
        )
        with mp4_writer(Path(folder) / "video.mp4", width=size, height=size, fps=8) as sink:
            result = engine.generate(request, [sink])
    return {
        "windows": len(result.plan.windows),
        "megabytes": memory_megabytes("VmHWM") - loaded,
        "remembered": result.forecaster_bytes / 2**20,
    }


def in_process(arguments: list[str]) -> dict[str, float]:
    """`measure` in a process of its own, whose freed tensors go back to the system at once."""
    command = [sys.executable, __file__, *arguments]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    told = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    return dict(json.loads(told.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=128, help="width and height")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--windows", type=int, default=10, help="of the long video")
    parser.add_argument("--frames", type=int, help="measure one video of this length here, as JSON")
    parser.add_argument("--whole", action="store_true", help="with --frames: in one piece, without windows")
    parser.add_argument("--stream", choices=STREAMS, default="guided", help="with --frames: what is forecast")
    given = parser.parse_args()
    config = load_config("wan-tiny")
    assert config.window is not None
    if given.frames is not None:
        chosen = config.model_copy(update={"window": None}) if given.whole else config
        print(json.dumps(measure(chosen, given.frames, given.size, given.steps, given.stream)))
        return
    short = config.window.frames
    long = short + (given.windows - 1) * (short + 3 - config.window.overlap)
    for stream in STREAMS:
        first = 0.0
        for name, frames, more in (
            ("one window", short, []),
            (f"{given.windows} windows", long, []),
            ("the same, whole", long, ["--whole"]),
        ):
            common = ["--size", str(given.size), "--steps", str(given.steps), "--stream", stream]
            run = in_process([*common, "--frames", str(frames), *more])
            first = first or run["megabytes"]
            print(
                f"{stream:8} {name:16} {frames:4} frames, {run['windows']:2.0f} windows: "
                f"{run['megabytes']:6.0f} MB, {run['megabytes'] / first:5.2f} × one window; "
                f"{run['remembered']:5.1f} MB of it remembered",
                flush=True,
            )


if __name__ == "__main__":
    main()
