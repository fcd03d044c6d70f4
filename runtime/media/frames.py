"""Reading frames of a video file: only the requested ones are held in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from runtime.errors import JobFailedError
from runtime.media.ffmpeg import Ffmpeg, file_url
from runtime.media.mp4 import Frames


def pick_frames(video: Path, wanted: Sequence[int]) -> list[Frames]:
    """Read some frames of a video, each `[H, W, 3]`.

    Args:
        video: the file.
        wanted: numbers of the frames, from 0, in any order.

    Raises:
        JobFailedError: ffmpeg could not read them, or the video is too short.
    """
    numbers = sorted(set(wanted))
    picked = "+".join(f"eq(n,{number})" for number in numbers)
    found = list(_read(video, "-vf", f"select='{picked}'", "-frames:v", str(len(numbers))))
    if len(found) != len(numbers):
        raise JobFailedError(f"{str(video)!r} is truncated: it has no frame {numbers[len(found)]}")
    return [found[numbers.index(number)] for number in wanted]


def read_frames(video: Path) -> Frames:
    """Read all frames of a video, `[T, H, W, 3]`.

    Raises:
        JobFailedError: ffmpeg could not read them.
    """
    return np.stack(list(_read(video)))


def _read(video: Path, *which: str) -> Iterator[Frames]:
    """Yield frames as ffmpeg sends them: portable pixmaps, one after another, each with its size."""
    sent = ["-fps_mode", "passthrough", "-f", "image2pipe", "-c:v", "ppm", "pipe:1"]
    doing = f"read {str(video)!r}"
    with Ffmpeg("-i", file_url(video), "-map", "0:v:0", *which, *sent, doing=doing) as ffmpeg:
        held = bytearray()
        while chunk := ffmpeg.read():
            held += chunk
            while (frame := _take(held)) is not None:
                yield frame
        ffmpeg.finish()


def _take(held: bytearray) -> Frames | None:
    """Take the first pixmap out of `held`; None if it is not yet complete."""
    begin, head = 0, []
    for _ in ("P6", "width height", "255"):
        line, begin = begin, held.find(b"\n", begin) + 1
        if begin == 0:
            return None
        head.append(bytes(held[line:begin]))
    width, height = map(int, head[1].split())
    end = begin + 3 * width * height
    if len(held) < end:
        return None
    frame = np.frombuffer(bytes(held[begin:end]), np.uint8).reshape(height, width, 3)
    del held[:end]
    return frame
