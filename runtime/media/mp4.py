"""Frames → mp4 while they arrive.

Tensor legend: T frames, H, W height and width in pixels. Frames are uint8 RGB.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from runtime.files.atomic import whole_file
from runtime.media.ffmpeg import SILENCE, Ffmpeg, file_url

Frames = NDArray[np.uint8]
CODEC = (
    "-c:v", "libx264", "-preset", "medium", "-crf", "14", "-pix_fmt", "yuv420p",
    "-color_range", "tv", "-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709",
)  # fmt: skip


class FrameSink(Protocol):
    """Where the frames of one video go."""

    def write(self, frames_THW3: Frames) -> None:
        """Take the next frames, in temporal order."""
        ...


def to_uint8(frames_THW3: torch.Tensor) -> Frames:
    """Frames in [0, 1] → uint8, rounded to nearest."""
    return frames_THW3.float().mul(255.0).round_().to(torch.uint8).cpu().numpy()


class Tee:
    """One video to several sinks."""

    def __init__(self, *sinks: FrameSink):
        self._sinks = sinks

    def write(self, frames_THW3: Frames) -> None:
        for sink in self._sinks:
            sink.write(frames_THW3)


class ColourWatch:
    """Looks whether all frames of a video are of one colour: what a model that went wrong shows."""

    def __init__(self) -> None:
        self._first: Frames | None = None
        self._varied = False

    def write(self, frames_THW3: Frames) -> None:
        if self._varied or frames_THW3.size == 0:
            return
        if self._first is None:
            self._first = frames_THW3[0, 0, 0].copy()
        self._varied = bool((frames_THW3 != self._first).any())

    @property
    def colour(self) -> str | None:
        """The one colour, such as `#000000`; None if there are several, or no frames."""
        if self._first is None or self._varied:
            return None
        return "#" + bytes(self._first).hex()

    def warning(self, what: str) -> list[str]:
        """What is to be said of it, if anything.

        Args:
            what: was looked at, as the subject of a sentence.
        """
        if self.colour is None:
            return []
        return [
            f"{what} shows nothing: every pixel of every frame is {self.colour}, so its PSNR, SSIM and VMAF "
            "mean nothing, either; look at the model's weights, the LoRA and the dtypes"
        ]


class FrameBuffer:
    """Keeps the whole video in memory, for callers that want an array."""

    def __init__(self) -> None:
        self._chunks: list[Frames] = []

    def write(self, frames_THW3: Frames) -> None:
        self._chunks.append(frames_THW3)

    @property
    def frames(self) -> Frames:
        """All frames so far, `[T, H, W, 3]`."""
        return np.concatenate(self._chunks)


class RawFrames:
    """Frames as bytes, one after another: what ffmpeg calls rawvideo rgb24."""

    def __init__(self, file: IO[bytes]):
        self._file = file

    def write(self, frames_THW3: Frames) -> None:
        self._file.write(_bytes(frames_THW3))

    def flush(self) -> None:
        """Hand everything written so far to readers of the file."""
        self._file.flush()


class _Encoder:
    """Frames to an ffmpeg that reads them on its standard input."""

    def __init__(self, ffmpeg: Ffmpeg):
        self._ffmpeg = ffmpeg

    def write(self, frames_THW3: Frames) -> None:
        self._ffmpeg.write(_bytes(frames_THW3))


def _bytes(frames_THW3: Frames) -> memoryview:
    return np.ascontiguousarray(frames_THW3).reshape(-1).data


@contextmanager
def mp4_writer(path: Path, *, width: int, height: int, fps: int) -> Iterator[FrameSink]:
    """Write H.264 in yuv420p, limited range, BT.709: what browsers play. `path` appears whole or not at all.

    Args:
        path: the mp4; its folder exists.
        width, height: pixels, even.
        fps: frames per second.

    Raises:
        JobFailedError: ffmpeg failed (a full disk, for instance).
    """
    with whole_file(path) as temporary, mp4_encoder(temporary, width=width, height=height, fps=fps) as sink:
        yield sink


@contextmanager
def mp4_encoder(
    path: Path, *, width: int, height: int, fps: int, silence: float = SILENCE
) -> Iterator[FrameSink]:
    """As `mp4_writer`, but straight to `path`, for callers who give it its name when all is done.

    Args:
        silence: seconds after which an ffmpeg that does nothing is given up.
    """
    arguments = [
        "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps), "-i", "pipe:0",
        "-vf", "scale=in_range=pc:out_range=tv:out_color_matrix=bt709:flags=accurate_rnd+full_chroma_int",
        *CODEC, "-movflags", "+faststart", "-an", "-f", "mp4", file_url(path),
    ]  # fmt: skip
    with Ffmpeg(*arguments, doing="write the video", silence=silence) as ffmpeg:
        yield _Encoder(ffmpeg)
        ffmpeg.finish()
