"""Joined shots, read back from the film."""

from __future__ import annotations

import dataclasses
import os
import re
import resource
import subprocess
from itertools import pairwise
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from runtime.errors import JobFailedError
from runtime.film.assemble import (
    Part,
    check_audio,
    join_film,
    length,
    one_line,
    starts,
    write_contact_sheet,
    write_poster,
)
from runtime.media.ffmpeg import Ffmpeg, file_url, run_ffmpeg
from runtime.media.frames import read_frames
from runtime.media.mp4 import CODEC, Frames, mp4_writer

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


TITLES = [
    "a = b; #1 \\ [x] 'y' \"z\"",
    "two\nlines\r\nand=more",
    "[CHAPTER]",
    "é 猫 🎬",
    "\x1b[31mred\x00",
    ";FFMETADATA1",
]


@pytest.mark.parametrize("fade", [0, 2])
def test_titles_arrive_as_one_line_of_text(fade: int, tmp_path: Path) -> None:
    parts = [
        dataclasses.replace(shot(tmp_path, f"s{number}", 5, 40), title=title, fade=fade if number else 0)
        for number, title in enumerate(TITLES)
    ]
    film = tmp_path / "film.mp4"
    for title in TITLES:
        join_film(parts[:2], film, title=title, fps=FPS)
        assert one_line(title) in described(film)
    join_film(parts, film, title="t", fps=FPS)
    told = tmp_path / "told.txt"
    run_ffmpeg("-i", file_url(film), "-f", "ffmetadata", file_url(told), doing="read chapters")
    chapters = told.read_text().split("\n[CHAPTER]\n")[1:]
    assert len(chapters) == len(TITLES)
    found = [re.search(r"title=(.*)", chapter)[1] for chapter in chapters]  # type: ignore[index]
    assert [re.sub(r"\\(.)", r"\1", title) for title in found] == [one_line(title) for title in TITLES]
    write_contact_sheet(parts, tmp_path / "sheet.png")


@pytest.mark.parametrize("folder", ["it's", "new\nline", "concat:x", "caf\udce9", "-x", "a;b,c=[d]"])
@pytest.mark.parametrize("fade", [0, 2])
def test_a_folder_may_be_called_anything(
    folder: str, fade: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(folder).mkdir()
    tone(Path(folder) / "take:2.wav", 1)
    parts = [shot(Path(folder), "a", 5, 40), shot(Path(folder), "b", 5, 120, fade)]
    join_film(parts, Path(folder) / "film.mp4", title="t", fps=FPS, audio=Path(folder) / "take:2.wav")
    assert len(read_frames(Path(folder) / "film.mp4")) == 10 - fade
    assert len(list(Path(folder).iterdir())) == 4


def tone(path: Path, seconds: float) -> None:
    source = ["-f", "lavfi", "-i", f"sine=frequency=440:duration={seconds}"]
    run_ffmpeg(*source, "-f", "wav", file_url(path), doing="make a tone")


@pytest.mark.parametrize(
    "name", ["take:2.wav", "-x.wav", "concat:a|b.wav", "caf\udce9.wav", "new\nline", "http://x"]
)
def test_a_track_may_be_called_anything(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    tone(Path(name), 1)
    assert check_audio(Path(name), 2.0) == ""


def test_a_track_without_sound_is_found_out(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("la la la")
    (tmp_path / "empty.mp3").write_bytes(b"")
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.mp3\n")
    silent = shot(tmp_path, "silent", 5, 40).video
    tone(tmp_path / "long.wav", 4)
    head = (tmp_path / "long.wav").read_bytes()
    (tmp_path / "head.wav").write_bytes(head[:78])
    for path in (
        tmp_path / "notes.txt",
        tmp_path / "empty.mp3",
        tmp_path / "list.m3u8",
        silent,
        tmp_path / "head.wav",
    ):
        assert re.match("it has no (readable )?sound", check_audio(path, 2.0)), path
    assert check_audio(tmp_path / "none.mp3", 2.0) == "there is no such file"
    assert check_audio(tmp_path / "notes.txt" / "a.mp3", 2.0) == "it cannot be read: Not a directory"
    assert check_audio(tmp_path, 2.0) == "it is a folder, a file is needed"
    os.mkfifo(tmp_path / "pipe.wav")
    assert check_audio(tmp_path / "pipe.wav", 2.0) == "it is a pipe or a device, a file is needed"


def many(folder: Path, count: int, frames: int, fade: int) -> list[Part]:
    one, other = shot(folder, "one", frames, 40), shot(folder, "other", frames, 140)
    return [
        dataclasses.replace((one, other)[number % 2], fade=fade if number % 3 else 0)
        for number in range(count)
    ]


def encoded(video: Path) -> list[str]:
    """Packets with their times and digests."""
    with Ffmpeg(
        "-i", file_url(video), "-map", "0:v", "-c", "copy", "-f", "framemd5", "pipe:1", doing="look"
    ) as ffmpeg:
        return ffmpeg.finish().decode().splitlines()


@pytest.mark.parametrize(("frames", "fade"), [(9, 3), (5, 1), (5, 2)])
def test_crossfades_are_those_of_parts_that_fade_one_after_the_other(
    tmp_path: Path, frames: int, fade: int
) -> None:
    """Bit for bit those of a chain of ffmpeg's filters, each from all before to the next part."""
    parts = many(tmp_path, 7, frames, fade)
    film, chained = tmp_path / "film.mp4", tmp_path / "chained.mp4"
    join_film(parts, film, title="t", fps=FPS)
    sources = [argument for part in parts for argument in ("-i", file_url(part.video))]
    steps, last = [f"[0:v]settb=1/{FPS}[p0]"], "p0"
    for number, (part, start) in enumerate(zip(parts[1:], starts(parts)[1:], strict=True), 1):
        if part.fade:
            how = f"xfade=transition=fade:duration={part.fade / FPS:.6f}:offset={start / FPS:.6f}"
        else:
            how = f"concat=n=2:v=1:a=0,settb=1/{FPS}"
        steps += [f"[{number}:v]settb=1/{FPS}[s{number}]", f"[{last}][s{number}]{how}[p{number}]"]
        last = f"p{number}"
    made = ["-filter_complex", ";".join(steps), "-map", f"[{last}]", *CODEC, "-r", str(FPS)]
    run_ffmpeg(*sources, *made, file_url(chained), doing="chain")
    assert len(encoded(film)) > length(parts)
    assert encoded(film) == encoded(chained)


def test_a_film_of_many_shots_opens_few_files(tmp_path: Path) -> None:
    parts = many(tmp_path, 90, 5, fade=2)
    film = tmp_path / "film.mp4"
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = 30 + len(list(Path("/dev/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, before[1]))
    try:
        join_film(parts, film, title="t", fps=FPS)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert len(encoded(film)) > length(parts)


@pytest.mark.parametrize("fade", [0, 2])
def test_a_shot_that_is_broken_or_gone_is_no_end_of_the_film(tmp_path: Path, fade: int) -> None:
    parts = [shot(tmp_path, name, 9, 40, fade if name != "a" else 0) for name in "abc"]
    film, whole = tmp_path / "film.mp4", parts[1].video.read_bytes()
    for content in (b"half", whole[:-300], whole[: len(whole) // 2], b"", None):
        parts[1].video.unlink(missing_ok=True)
        if content is not None:
            parts[1].video.write_bytes(content)
        with pytest.raises(JobFailedError, match="ffmpeg could not join"):
            join_film(parts, film, title="t", fps=FPS)
        assert not film.exists()
