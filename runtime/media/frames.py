"""Frames of a video's file, only those that are wanted: memory for these, however long the video is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from runtime.errors import JobFailedError
from runtime.media.ffmpeg import Ffmpeg, file_url
from runtime.media.mp4 import Frames


def pick_frames(video: Path, wanted: Sequence[int]) -> list[Frames]:
    """Some frames, each `[H, W, 3]`.

    Args:
        wanted: their numbers, from 0, in any order.

    Raises:
        JobFailedError: ffmpeg could not read them.
    """
    numbers = sorted(set(wanted))
    picked = "+".join(f"eq(n,{number})" for number in numbers)
    found = list(_read(video, "-vf", f"select='{picked}'", "-frames:v", str(len(numbers))))
    if len(found) != len(numbers):
        raise JobFailedError(
            f"{str(video)!r} is shorter than it was made: it has no frame {numbers[len(found)]}"
        )
    return [found[numbers.index(number)] for number in wanted]


def read_frames(video: Path) -> Frames:
    """All frames, `[T, H, W, 3]`.

    Raises:
        JobFailedError: ffmpeg could not read them.
    """
    return np.stack(list(_read(video)))


def _read(video: Path, *which: str) -> Iterator[Frames]:
    """Frames as ffmpeg sends them: portable pixmaps, one after another, each with its size."""
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
    """The first picture of `held`, which is removed from it; None if it is not there as a whole."""
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
