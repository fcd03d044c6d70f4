"""Joined shots, read back from the film."""

from __future__ import annotations

import subprocess
from itertools import pairwise
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from runtime.errors import JobFailedError
from runtime.film import Part, join_film, length, read_frames, starts, write_contact_sheet, write_poster
from runtime.video import Frames, mp4_writer

FPS, WIDTH, HEIGHT = 8, 64, 48


def shot(folder: Path, name: str, frames: int, level: int, fade: int = 0) -> Part:
    """A shot whose frames are gray, a little lighter from one to the next."""
    video = folder / f"{name}.mp4"
    values = (level + np.arange(frames))[:, None, None, None]
    content: Frames = np.broadcast_to(values, (frames, HEIGHT, WIDTH, 3)).astype(np.uint8)
    with mp4_writer(video, width=WIDTH, height=HEIGHT, fps=FPS) as sink:
        sink.write(content)
    return Part(name, video, frames, fade)


def levels(video: Path) -> list[float]:
    return [float(frame.mean()) for frame in read_frames(video)]


def described(video: Path) -> str:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-i", str(video)]
    return subprocess.run(command, capture_output=True, text=True, check=False).stderr


def test_cuts_are_joined_without_encoding_again(tmp_path: Path) -> None:
    parts = [shot(tmp_path, "it's", 9, 40), shot(tmp_path, "b", 5, 120)]
    film = tmp_path / "film.mp4"
    join_film(parts, film, title="A = B; #1", fps=FPS)
    assert np.array_equal(read_frames(film), np.concatenate([read_frames(part.video) for part in parts]))
    said = described(film)
    assert "A = B; #1" in said
    assert "Chapter #0:0: start 0.000000, end 1.125000" in said
    assert "Chapter #0:1: start 1.125000, end 1.750000" in said
    assert "it's" in said


def test_a_crossfade_goes_from_one_to_the_other(tmp_path: Path) -> None:
    parts = [shot(tmp_path, "a", 9, 40), shot(tmp_path, "b", 9, 140, fade=4), shot(tmp_path, "c", 5, 60)]
    assert starts(parts) == [0, 5, 14]
    film = tmp_path / "film.mp4"
    join_film(parts, film, title="t", fps=FPS)
    found = levels(film)
    assert len(found) == length(parts) == 19
    assert found[:5] == pytest.approx([40, 41, 42, 43, 44], abs=4)
    assert all(b > a for a, b in pairwise(found[4:9]))
    assert found[9:14] == pytest.approx([144, 145, 146, 147, 148], abs=6)
    assert found[14:] == pytest.approx([60, 61, 62, 63, 64], abs=4)


@pytest.mark.parametrize("fade", [0, 2])
def test_a_track_is_put_under_the_film(tmp_path: Path, fade: int) -> None:
    sound = tmp_path / "sound.wav"
    tone = ["-f", "lavfi", "-i", "sine=frequency=440:duration=9", str(sound)]
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", *tone], check=True)
    parts = [shot(tmp_path, "a", 9, 40), shot(tmp_path, "b", 9, 140, fade=fade)]
    film = tmp_path / "film.mp4"
    join_film(parts, film, title="t", fps=FPS, audio=sound)
    said = described(film)
    assert "Audio: aac" in said and "Chapter #0:1" in said
    assert len(read_frames(film)) == 18 - fade


def test_a_film_that_cannot_be_joined_leaves_nothing(tmp_path: Path) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"half")
    film = tmp_path / "film.mp4"
    with pytest.raises(JobFailedError, match="ffmpeg could not join"):
        join_film([Part("a", broken, 5)], film, title="t", fps=FPS)
    assert [path.name for path in tmp_path.iterdir()] == ["broken.mp4"]


def test_poster_and_contact_sheet(tmp_path: Path) -> None:
    parts = [shot(tmp_path, "a", 9, 40), shot(tmp_path, "b", 5, 120)]
    write_poster(parts, tmp_path / "poster.png")
    poster = np.asarray(Image.open(tmp_path / "poster.png"))
    assert poster.shape == (HEIGHT, WIDTH, 3)
    assert poster.mean() == pytest.approx(44, abs=3)
    write_contact_sheet(parts, tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (2 * (HEIGHT + 24), 5 * WIDTH, 3)
