"""Quality of a video against a reference: PSNR, SSIM and VMAF of raw frames, before any lossy encoding.

Tensor legend: T frames, H, W height and width in pixels.
"""

from __future__ import annotations

import math
import re
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import imageio_ffmpeg
import numpy as np

from runtime.errors import JobFailedError
from runtime.media.ffmpeg import file_url, run_ffmpeg
from runtime.media.mp4 import Frames

PSNR_OF_EQUALS = 100.0  # dB, reported for equal videos, whose PSNR is infinite


@dataclass(frozen=True, slots=True)
class RawVideo:
    """A file of rgb24 frames."""

    path: Path
    width: int
    height: int

    def frames(self) -> np.memmap[tuple[int, int, int, int], np.dtype[np.uint8]]:
        """Map the frames `[T, H, W, 3]` from the file."""
        frames = self.path.stat().st_size // (self.width * self.height * 3)
        return np.memmap(self.path, np.uint8, "r", shape=(frames, self.height, self.width, 3))


@dataclass(frozen=True, slots=True)
class Quality:
    """Quality of a video against its reference.

    Attributes:
        psnr: dB over all RGB samples of all frames; 100 for equal videos.
        ssim: ffmpeg's `ssim` filter on yuv444p, all planes.
        vmaf: ffmpeg's `libvmaf` filter, model v0.6.1, mean over frames; None if this ffmpeg lacks the filter.
    """

    psnr: float
    ssim: float
    vmaf: float | None


def psnr(frames: Frames, truth: Frames) -> float:
    """PSNR in dB of frames `[T, H, W, 3]`, over all samples: 10 log₁₀(255² / mean squared error)."""
    if frames.shape != truth.shape:
        raise ValueError(f"videos of {frames.shape} and {truth.shape} cannot be compared")
    squares = sum(
        float(np.square(a.astype(np.float64) - b).sum()) for a, b in zip(frames, truth, strict=True)
    )
    if squares == 0.0:
        return PSNR_OF_EQUALS
    return min(PSNR_OF_EQUALS, 10.0 * math.log10(255.0**2 * truth.size / squares))


def compare_videos(video: RawVideo, reference: RawVideo) -> Quality:
    """Measure `video` against `reference`, which has the same size and length."""
    return Quality(
        psnr=psnr(video.frames(), reference.frames()),
        ssim=_measure(video, reference, "ssim", r"All:([\d.]+)"),
        vmaf=_measure(video, reference, "libvmaf", r"VMAF score: ([\d.]+)")
        if has_filter("libvmaf")
        else None,
    )


def has_filter(name: str) -> bool:
    """Return whether the bundled ffmpeg has the filter `name`."""
    return re.search(rf"\s{re.escape(name)}\s", _filter_listing()) is not None


@cache
def _filter_listing() -> str:
    """ffmpeg's list of filters, cached, as the binary does not change under a running process."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-filters"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _measure(video: RawVideo, reference: RawVideo, metric: str, pattern: str) -> float:
    inputs = []
    for one in (video, reference):
        inputs += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{one.width}x{one.height}", "-r", "25"]
        inputs += ["-i", file_url(one.path)]
    graph = f"[0:v]format=yuv444p[a];[1:v]format=yuv444p[b];[a][b]{metric}"
    null = ["-lavfi", graph, "-f", "null", "-"]
    said = run_ffmpeg(*inputs, *null, doing=f"measure {metric}", loglevel="info")
    match = re.search(pattern, said)
    if match is None:
        raise JobFailedError(f"ffmpeg's {metric} gave no result: {' / '.join(said.splitlines()[-3:])}")
    return float(match.group(1))
