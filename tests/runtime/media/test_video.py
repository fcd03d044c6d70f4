"""The mp4: playable, right colours, whole or not at all."""

from __future__ import annotations

import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch

from runtime.errors import JobFailedError
from runtime.media.mp4 import Frames, mp4_writer, to_uint8

COLOURS = [(230, 30, 30), (30, 200, 40), (20, 40, 240), (255, 255, 255), (0, 0, 0), (120, 120, 120)]


def flat(colour: tuple[int, int, int], frames: int = 3) -> Frames:
    return np.broadcast_to(np.asarray(colour, np.uint8), (frames, 32, 48, 3))


def read_back(path: Path) -> Frames:
    """Decode as a player does that believes the file's colour tags."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-i", str(path)]
    command += [
        "-vf",
        "scale=in_color_matrix=bt709:in_range=tv:out_range=pc",
        "-f",
        "rawvideo",
        "-pix_fmt",
        "rgb24",
        "-",
    ]
    data = subprocess.run(command, capture_output=True, check=True).stdout
    return np.frombuffer(data, np.uint8).reshape(-1, 32, 48, 3)


def test_colours_survive(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with mp4_writer(path, width=48, height=32, fps=8) as sink:
        for colour in COLOURS:
            sink.write(flat(colour))
    frames = read_back(path)
    assert len(frames) == 3 * len(COLOURS)
    for index, colour in enumerate(COLOURS):
        np.testing.assert_allclose(frames[3 * index + 1].mean(axis=(0, 1)), colour, atol=6)


def test_the_stream_is_what_browsers_play(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with mp4_writer(path, width=48, height=32, fps=8) as sink:
        sink.write(flat((9, 99, 199)))
    probe = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(path), "-f", "null", "-"]
    said = subprocess.run(probe, capture_output=True, text=True, check=True).stderr
    video = next(line for line in said.splitlines() if "Video:" in line)
    for property_ in ("h264", "yuv420p(tv, bt709", "48x32", "8 fps"):
        assert property_ in video
    content = path.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")  # plays while it loads


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_interrupted_video_leaves_no_file(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), mp4_writer(tmp_path / "a.mp4", width=48, height=32, fps=8) as sink:
        sink.write(flat((1, 2, 3)))
        raise error
    assert list(tmp_path.iterdir()) == []


def test_ffmpegs_own_words_are_in_the_error(tmp_path: Path) -> None:
    with (
        pytest.raises(JobFailedError, match="ffmpeg could not write"),
        mp4_writer(
            tmp_path / "a.mp4",
            width=47,
            height=32,
            fps=8,  # yuv420p needs even sides
        ) as sink,
    ):
        sink.write(np.zeros((1, 32, 47, 3), np.uint8))
    assert list(tmp_path.iterdir()) == []


def test_to_uint8_rounds_to_nearest() -> None:
    values = torch.tensor([0.0, 0.499 / 255, 0.501 / 255, 1.0]).view(1, 1, 4, 1).expand(1, 1, 4, 3)
    assert to_uint8(values)[0, 0, :, 0].tolist() == [0, 0, 1, 255]
