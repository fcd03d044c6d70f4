"""Frames of a file: the right ones, bit for bit, and no more of them in memory than are wanted."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from runtime.errors import JobFailedError
from runtime.film.assemble import Part, sheet_size, strip, write_contact_sheet, write_poster
from runtime.media.frames import pick_frames, read_frames
from runtime.media.mp4 import Frames, mp4_writer

WIDTH, HEIGHT = 64, 48


def moving(path: Path, frames: int) -> Path:
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    with mp4_writer(path, width=WIDTH, height=HEIGHT, fps=8) as sink:
        for t in range(frames):
            sink.write(
                np.stack([(x * 4 + t) % 256, (y * 5 + t) % 256, (x + y + t) % 256], -1)[None].astype(np.uint8)
            )
    return path


def by_imageio(path: Path) -> Frames:
    reader = imageio_ffmpeg.read_frames(str(path))
    next(reader)
    return np.stack([np.frombuffer(frame, np.uint8).reshape(HEIGHT, WIDTH, 3) for frame in reader])


@pytest.mark.parametrize("frames", [1, 5, 33])
def test_frames_are_those_of_another_reader(frames: int, tmp_path: Path) -> None:
    video = moving(tmp_path / "a.mp4", frames)
    truth = by_imageio(video)
    assert np.array_equal(read_frames(video), truth) and len(truth) == frames
    for wanted in ([0], [frames - 1], [frames // 2, 0, frames // 2], list(range(frames))):
        assert np.array_equal(np.stack(pick_frames(video, wanted)), truth[wanted])
    part = Part("a", video, frames)
    shown = np.linspace(0, frames - 1, 5).round().astype(int)
    assert np.array_equal(strip(part), np.concatenate(list(truth[shown]), axis=1))
    write_poster([part], tmp_path / "poster.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "poster.png")), truth[frames // 2])
    write_contact_sheet([part, part], tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert np.array_equal(sheet[18 : 18 + HEIGHT], strip(part))


def test_memory_does_not_grow_with_the_video(tmp_path: Path) -> None:
    peaks = []
    for frames in (101, 1001):
        part = Part("a", moving(tmp_path / f"{frames}.mp4", frames), frames)
        tracemalloc.start()
        try:
            strip(part)
            write_poster([part], tmp_path / "poster.png")
            write_contact_sheet([part], tmp_path / "sheet.png")
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]
    assert peaks[1] < 1001 * WIDTH * HEIGHT * 3 / 4


def test_a_video_that_is_too_short_or_none_is_said_to_be(tmp_path: Path) -> None:
    video = moving(tmp_path / "a.mp4", 5)
    with pytest.raises(JobFailedError, match=r"a\.mp4' is truncated: it has no frame 7"):
        pick_frames(video, [4, 7])
    (tmp_path / "b.mp4").write_bytes(b"half")
    with pytest.raises(JobFailedError, match=r"could not read '.*b\.mp4' \(exit .*Invalid data"):
        pick_frames(tmp_path / "b.mp4", [0])


@pytest.mark.parametrize("shots", [1, 6, 500, 9999])
@pytest.mark.parametrize("size", [(48, 320), (480, 4160), (720, 6400)])
def test_contact_sheets_of_many_shots_are_pictures_that_can_be_looked_at(
    shots: int, size: tuple[int, int]
) -> None:
    height, width = sheet_size(shots, *size)
    assert shots * (height + 24) * width < 40e6
    if shots == 1:
        assert (height, width) == size
