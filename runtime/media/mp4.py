"""Encoding frames to mp4 while they arrive.

Tensor legend: T frames, H, W height and width in pixels. Frames are uint8 RGB.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.files.atomic import whole_file
from runtime.media.ffmpeg import SILENCE, Ffmpeg, file_url

if TYPE_CHECKING:  # it takes seconds
    import torch

Frames = NDArray[np.uint8]
PRESET = "veryfast"  # of x264; by scripts/bench_x264.py as small as "medium", in 0.3 to 0.5 of its time


def codec(preset: str = PRESET) -> tuple[str, ...]:
    """Arguments of ffmpeg for the codec, its quality and its colours."""
    return (
        "-c:v", "libx264", "-preset", preset, "-crf", "14", "-pix_fmt", "yuv420p",
        "-color_range", "tv", "-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709",
    )  # fmt: skip


CODEC = codec()


class FrameSink(Protocol):
    """Receiver of the frames of one video."""

    def write(self, frames_THW3: Frames) -> None:
        """Take the next frames, in temporal order."""
        ...


def to_uint8(frames_THW3: torch.Tensor) -> Frames:
    """Convert frames in [0, 1] to uint8, rounded to nearest."""
    import torch

    return frames_THW3.float().mul(255.0).round_().to(torch.uint8).cpu().numpy()


class Tee:
    """Sink that passes one video on to several sinks."""

    def __init__(self, *sinks: FrameSink):
        self._sinks = sinks

    def write(self, frames_THW3: Frames) -> None:
        for sink in self._sinks:
            sink.write(frames_THW3)


class ColourWatch:
    """Sink that detects a video of a single colour, the usual output of a broken model."""

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
        """Single colour of the video, such as `#000000`; None if there are several, or no frames."""
        if self._first is None or self._varied:
            return None
        return "#" + bytes(self._first).hex()

    def warning(self, what: str) -> list[str]:
        """Make a warning about a video of a single colour, or none.

        Args:
            what: name of the video, as the subject of a sentence.
        """
        if self.colour is None:
            return []
        return [
            f"{what} shows nothing: every pixel of every frame is {self.colour}, so its PSNR, SSIM and VMAF "
            "are meaningless, too; check the model's weights, the LoRA and the dtypes"
        ]


class FrameBuffer:
    """Sink that keeps the whole video in memory."""

    def __init__(self) -> None:
        self._chunks: list[Frames] = []

    def write(self, frames_THW3: Frames) -> None:
        self._chunks.append(frames_THW3)

    @property
    def frames(self) -> Frames:
        """All frames so far, `[T, H, W, 3]`."""
        return np.concatenate(self._chunks)


class RawFrames:
    """Sink that writes frames as raw bytes, one after another (ffmpeg's rawvideo rgb24)."""

    def __init__(self, file: IO[bytes]):
        self._file = file

    def write(self, frames_THW3: Frames) -> None:
        self._file.write(_bytes(frames_THW3))

    def flush(self) -> None:
        """Make everything written so far visible to readers of the file."""
        self._file.flush()


class _Encoder:
    """Sink that sends frames to the standard input of an ffmpeg."""

    def __init__(self, ffmpeg: Ffmpeg):
        self._ffmpeg = ffmpeg

    def write(self, frames_THW3: Frames) -> None:
        self._ffmpeg.write(_bytes(frames_THW3))


def _bytes(frames_THW3: Frames) -> memoryview:
    return np.ascontiguousarray(frames_THW3).reshape(-1).data


@contextmanager
def mp4_writer(path: Path, *, width: int, height: int, fps: int) -> Iterator[FrameSink]:
    """Write H.264 in yuv420p, limited range, BT.709, which browsers play; `path` appears whole or not at all.

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
    path: Path, *, width: int, height: int, fps: int, silence: float = SILENCE, preset: str = PRESET
) -> Iterator[FrameSink]:
    """Write as `mp4_writer` does, but directly to `path`, for callers that rename it themselves.

    Args:
        path, width, height, fps: as in `mp4_writer`.
        silence: limit in seconds for a time in which ffmpeg does nothing.
        preset: x264's preset, which trades time for size.
    """
    arguments = [
        "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps), "-i", "pipe:0",
        "-vf", "scale=in_range=pc:out_range=tv:out_color_matrix=bt709:flags=accurate_rnd+full_chroma_int",
        *codec(preset), "-movflags", "+faststart", "-an", "-f", "mp4", file_url(path),
    ]  # fmt: skip
    with Ffmpeg(*arguments, doing="write the video", silence=silence) as ffmpeg:
        yield _Encoder(ffmpeg)
        ffmpeg.finish()
