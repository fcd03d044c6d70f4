"""Pictures of a finished video: one frame, and a sheet of many."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from PIL import Image

from runtime.files.atomic import whole_file
from runtime.media.frames import pick_frames
from runtime.media.mp4 import Frames

_WIDTH = 640  # pixels of a thumbnail, at most
_TILES, _TILE = 16, 320  # frames of a sheet, at most; pixels of the width of each


def write_thumbnail(video: Path, path: Path, frames: int) -> None:
    """Write the frame in the middle of a video as WebP.

    Args:
        frames: number of frames of the video.

    Raises:
        JobFailedError: the video cannot be read.
    """
    [middle] = pick_frames(video, [frames // 2])
    with whole_file(path) as temporary:
        _scaled(middle, _WIDTH).save(temporary, "WEBP", quality=85)


def write_spritesheet(video: Path, path: Path, frames: int) -> None:
    """Write frames from all over a video, row by row, as one JPEG; arguments as of `write_thumbnail`."""
    count = min(_TILES, frames)
    numbers = [round(number) for number in np.linspace(0, frames - 1, count)]
    tiles = [_scaled(frame, _TILE) for frame in pick_frames(video, numbers)]
    columns = math.ceil(math.sqrt(count))
    width, height = tiles[0].size
    sheet = Image.new("RGB", (columns * width, math.ceil(count / columns) * height))
    for number, tile in enumerate(tiles):
        sheet.paste(tile, (number % columns * width, number // columns * height))
    with whole_file(path) as temporary:
        sheet.save(temporary, "JPEG", quality=85)


def _scaled(frame: Frames, width: int) -> Image.Image:
    """A frame that is at most `width` pixels wide."""
    image = Image.fromarray(frame)
    if image.width > width:
        image = image.resize(
            (width, max(1, round(image.height * width / image.width))), Image.Resampling.LANCZOS
        )
    return image
