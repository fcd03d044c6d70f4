"""Previews: small WebPs that move, at most one a second, in a file that is always whole."""

from __future__ import annotations

import io
import logging
import os
import resource
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runtime.errors import BadRequestError
from runtime.media.mp4 import Frames
from runtime.media.preview import LONGEST, PreviewFile, Previews, encode_preview
from runtime.request.outputs import Outputs, is_preview


def frames(videos: int = 1, count: int = 3, height: int = 6, width: int = 8) -> Frames:
    shades = np.linspace(20, 235, videos * count).reshape(videos, count, 1, 1, 1)
    return np.broadcast_to(shades, (videos, count, height, width, 3)).astype(np.uint8)


def decoded(content: bytes) -> list[Frames]:
    with Image.open(io.BytesIO(content)) as picture:
        pictures = []
        for number in range(getattr(picture, "n_frames", 1)):
            picture.seek(number)
            pictures.append(np.asarray(picture.convert("RGB")))
        return pictures


def test_it_moves_as_the_video_does() -> None:
    content = encode_preview(frames(count=4), seconds=0.25)
    shown = decoded(content)
    assert [round(float(one.mean())) for one in shown] == pytest.approx([20, 92, 163, 235], abs=3)
    with Image.open(io.BytesIO(content)) as picture:
        assert picture.info["loop"] == 0
        durations = []
        for number in range(getattr(picture, "n_frames", 1)):
            picture.seek(number)
            picture.load()
            durations.append(picture.info["duration"])
    assert durations == [250] * 4


@pytest.mark.parametrize(
    ("latents", "size"), [((6, 8), (64, 48)), ((60, 104), (256, 148)), ((90, 160), (256, 144))]
)
def test_it_is_small_whatever_the_size(latents: tuple[int, int], size: tuple[int, int]) -> None:
    shown = decoded(encode_preview(frames(height=latents[0], width=latents[1]), 0.2))
    assert {one.shape for one in shown} == {(size[1], size[0], 3)}
    assert max(size) <= LONGEST


def test_several_videos_share_a_picture() -> None:
    (shown,) = decoded(encode_preview(frames(videos=3, count=1, height=8, width=8), 0.2))
    assert shown.shape == (128, 128, 3)
    corners = [float(shown[y, x].mean()) for y, x in ((32, 32), (32, 96), (96, 32), (96, 96))]
    assert corners == pytest.approx([20, 127, 235, 0], abs=4)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_there_is_at_most_one_a_second() -> None:
    clock, made = Clock(), list[float]()
    for step in range(41):
        clock.now = 100 + 0.15 * step
        if step == 0:
            previews = Previews(lambda _: made.append(clock.now), clock)
        if previews.due:
            previews.show(frames(), 0.1)
            with previews:  # waits for it
                pass
    assert made == pytest.approx([100, 101.05, 102.1, 103.15, 104.2, 105.25])


def test_none_is_taken_while_the_last_is_written() -> None:
    clock, written, begun, shown = Clock(), threading.Event(), threading.Event(), []

    def deliver(content: bytes) -> None:
        begun.set()
        assert written.wait(60)
        shown.append(content)

    with Previews(deliver, clock) as previews:
        assert previews.due
        previews.show(frames(), 0.1)
        assert begun.wait(60)
        clock.now += 100
        assert not previews.due
        written.set()
    assert len(shown) == 1 and previews.due


def test_a_reader_always_finds_a_whole_one_and_none_at_the_end(tmp_path: Path) -> None:
    path, over, seen = tmp_path / "shown" / "a.webp", threading.Event(), set[int]()
    contents = [encode_preview(frames(count=count), 0.1) for count in range(1, 9)]

    def read() -> None:
        while not over.is_set():
            try:
                seen.add(len(decoded(path.read_bytes())))
            except FileNotFoundError:
                continue

    reader = threading.Thread(target=read)
    with PreviewFile(path) as file:
        assert file.put(contents[0])
        reader.start()
        assert all(file.put(content) for content in contents * 4)
        assert list(path.parent.iterdir()) == [path]
        over.set()
        reader.join()
        assert seen <= set(range(1, 9)) and seen
    assert list(path.parent.iterdir()) == []


def test_it_is_removed_when_the_job_fails(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), PreviewFile(tmp_path / "a.webp") as file:
        file.put(encode_preview(frames(), 0.1))
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_another_file_of_its_name_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content, path = encode_preview(frames(), 0.1), tmp_path / "1.webp"
    path.write_text("mine")
    with PreviewFile(path) as file:
        assert not file.put(content) and not file.put(content)
    assert path.read_text() == "mine" and len(caplog.records) == 1
    assert "another file has its name, and is kept" in caplog.text
    with PreviewFile(path, overwrite=True) as file:
        assert file.put(content) and file.put(content)
        path.write_text("mine, too")  # appeared meanwhile
        assert not file.put(content)
    assert path.read_text() == "mine, too"
    path.unlink()
    with PreviewFile(path) as file:
        assert file.put(content)
        path.unlink()
        path.mkdir()
        assert not file.put(content)
    assert path.is_dir()


def test_a_pipe_is_refused_without_waiting_for_its_other_end(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.webp")
    outputs = Outputs(tmp_path / "a.mp4", tmp_path / "a.json", preview=tmp_path / "a.webp")
    refused = list[BaseException]()

    def check() -> None:
        with pytest.raises(BadRequestError, match=r"a.webp' exists") as caught:
            outputs.check(1)
        refused.append(caught.value)

    thread = threading.Thread(target=check, daemon=True)
    thread.start()
    thread.join(60)
    assert refused


def test_a_full_disk_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    content = encode_preview(frames(), 0.1)
    with caplog.at_level(logging.WARNING), PreviewFile(tmp_path / "a.webp") as file:
        assert file.put(content)
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
        try:
            assert not file.put(content) and not file.put(content)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert file.path.read_bytes() == content  # the last that could be written
        assert file.put(content)
    (record,) = caplog.records
    assert "a.webp" in record.getMessage() and "File too large" in record.getMessage()


def test_only_a_preview_is_replaced(tmp_path: Path) -> None:
    """One that a killed job has left is no file of the user's."""
    shown = tmp_path / "a.webp"
    outputs = Outputs(tmp_path / "a.mp4", tmp_path / "a.json", preview=shown)
    shown.write_bytes(encode_preview(frames(), 0.1))
    assert is_preview(shown)
    outputs.check(1)
    Image.fromarray(frames()[0, 0]).save(shown)
    with pytest.raises(BadRequestError, match=r"preview: '.*a.webp' exists"):
        outputs.check(1)
    Outputs(tmp_path / "a.mp4", tmp_path / "a.json", overwrite=True, preview=shown).check(1)


def test_one_that_comes_too_late_is_not_written(tmp_path: Path) -> None:
    """An encoder that takes longer than anybody waits for it."""
    with PreviewFile(tmp_path / "a.webp") as file:
        pass
    assert not file.put(encode_preview(frames(), 0.1))
    assert list(tmp_path.iterdir()) == []


def test_its_name_ends_in_webp(tmp_path: Path) -> None:
    with pytest.raises(BadRequestError, match=r"preview: '.*a.gif' given; the name must end in .webp"):
        Outputs.named(tmp_path / "a.mp4", None, overwrite=False, preview=tmp_path / "a.gif")
