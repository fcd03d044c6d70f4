"""What x264's presets cost and give at the CRF of the videos that are written: processor time, size, quality.

    python scripts/bench_x264.py [--video FILE] [--repeats N]

Without a video, drawn scenes are encoded, as they are and with grain. The presets encode the same raw frames
in turns, so that other load of the machine meets all of them alike; processor time is that of all of ffmpeg's
threads. PSNR is that of the decoded mp4 against the raw frames.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from runtime.media.frames import read_frames
from runtime.media.mp4 import Frames, mp4_encoder, to_uint8
from runtime.media.quality import psnr
from runtime.models.clips import draw_clips

PRESETS = ("ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow")
COMPARED = "medium"  # x264's own choice
FRAMES, SIZE, FPS = 49, 512, 16
GRAIN = 0.02  # standard deviation, of 1


@dataclass(slots=True)
class Line:
    """What one preset took and gave."""

    seconds: list[float] = field(default_factory=list)
    size: int = 0
    psnr: float = 0.0


def scenes() -> dict[str, Frames]:
    """Two drawn scenes, side by side, without and with grain."""
    clip_3THW = torch.cat(list(draw_clips(2, FRAMES, SIZE, seed=1)), dim=-1)
    noise = GRAIN * torch.randn(clip_3THW.shape, generator=torch.Generator().manual_seed(0))
    drawn = {"drawn": clip_3THW, "drawn, with grain": (clip_3THW + noise).clamp(0, 1)}
    return {name: to_uint8(clip.permute(1, 2, 3, 0)) for name, clip in drawn.items()}


def processor_seconds() -> float:
    """Processor time of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(frames_THW3: Frames, folder: Path, repeats: int) -> dict[str, Line]:
    """Encode with every preset in turns."""
    lines = {preset: Line() for preset in PRESETS}
    _, height, width, _ = frames_THW3.shape
    for _ in range(repeats):
        for preset, line in lines.items():
            file, before = folder / f"{preset}.mp4", processor_seconds()
            with mp4_encoder(file, width=width, height=height, fps=FPS, preset=preset) as sink:
                for chunk in np.array_split(frames_THW3, max(1, len(frames_THW3) // 4)):
                    sink.write(chunk)
            line.seconds.append(processor_seconds() - before)
            line.size = file.stat().st_size
    for preset, line in lines.items():
        line.psnr = psnr(read_frames(folder / f"{preset}.mp4"), frames_THW3)
    return lines


def show(name: str, lines: dict[str, Line], frames_THW3: Frames) -> None:
    frames, height, width, _ = frames_THW3.shape
    usual = lines[COMPARED]
    print(f"\n{name}, {width}×{height}, {frames} frames\n")
    print(f"| preset | processor s per 81 frames | × {COMPARED} | size, kB | × {COMPARED} | PSNR, dB |")
    print("| --- | --- | --- | --- | --- | --- |")
    for preset, line in lines.items():
        seconds, base = statistics.median(line.seconds), statistics.median(usual.seconds)
        print(
            f"| {preset} | {seconds * 81 / frames:.2f} | {seconds / base:.2f} | {line.size / 1e3:,.0f} "
            f"| {line.size / usual.size:.2f} | {line.psnr:.2f} |"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--video", type=Path, help="frames to encode, instead of drawn ones")
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args(arguments)
    content = scenes() if given.video is None else {given.video.name: read_frames(given.video)}
    for name, frames_THW3 in content.items():
        with tempfile.TemporaryDirectory() as folder:
            show(name, measure(frames_THW3, Path(folder), given.repeats), frames_THW3)


if __name__ == "__main__":
    main()
