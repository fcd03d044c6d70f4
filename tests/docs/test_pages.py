"""Every command and program of README.md and docs/ runs as it is printed, or is listed with the reason.

In the default run those that take long are left out; the slow test of a page runs all of it, in order.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.media.ffmpeg import run_ffmpeg
from runtime.request.config import EMBEDDED_MODELS, shipped
from tests.docs.left_out import BEFORE, FILES, LEFT_OUT, SLOW
from tests.docs.pages import PAGES, Piece, Reader, pieces
from tests.places import ROOT

ALL = {str(page.relative_to(ROOT)): list(pieces(page)) for page in PAGES}


def keys(piece: Piece) -> Iterator[tuple[str, str]]:
    """Keys of the tables that are about a piece."""
    for table in (LEFT_OUT, SLOW):
        for page, beginning in table:
            if page in ("*", piece.page) and piece.text.startswith(beginning):
                yield page, beginning


def is_left_out(piece: Piece) -> bool:
    return any(key in LEFT_OUT for key in keys(piece))


def is_slow(piece: Piece) -> bool:
    return any(key in SLOW for key in keys(piece))


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Reader:
    """Whose home has a model, and whose folder is empty."""
    folder, home = tmp_path / "folder", tmp_path / "home"
    folder.mkdir()
    (home / "models").mkdir(parents=True)
    (home / "models" / "my-wan").symlink_to(EMBEDDED_MODELS / "wan-tiny")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("RAY_ADDRESS", "")
    monkeypatch.chdir(folder)
    return Reader(folder, capfd)


def prepare(reader: Reader, page: str) -> None:
    for name, content in FILES.get(page, {}).items():
        (reader.folder / name).write_text(content, encoding="utf-8")
    for command in BEFORE.get(page, []):
        reader.run(command)


@pytest.mark.parametrize("page", [page for page, of in ALL.items() if not all(map(is_left_out, of))])
def test_what_a_page_says_is_so(page: str, reader: Reader) -> None:
    prepare(reader, page)
    if page == "docs/calibration.md":  # in place of one that takes minutes to make
        shutil.copy(shipped("calibrations", "wan-tiny.json"), reader.folder / "mine.json")
    for piece in ALL[page]:
        if not is_left_out(piece) and not is_slow(piece):
            reader.follow(piece)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("page", [page for page, of in ALL.items() if any(map(is_slow, of))])
def test_the_whole_of_a_page_is_so(page: str, reader: Reader) -> None:
    prepare(reader, page)
    if page == "docs/storyboards.md":
        run_ffmpeg("-f", "lavfi", "-i", "sine=duration=9", str(reader.folder / "song.mp3"), doing="sing")
    for piece in ALL[page]:
        if not is_left_out(piece):
            reader.follow(piece)


def test_the_tables_name_what_is_on_the_pages() -> None:
    used = {key for of in ALL.values() for piece in of for key in keys(piece)}
    assert used == {*LEFT_OUT} | SLOW
    assert FILES.keys() | BEFORE.keys() <= ALL.keys()
    for reason in LEFT_OUT.values():
        for path in re.findall(r"(?:tests|scripts)/[\w/]+(?:\.py)?", reason):
            assert (ROOT / path).exists(), path


def test_commands_are_marked_as_such() -> None:
    """A block without a language would not be run."""
    unmarked = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        fenced = [block for number, block in enumerate(text.split("```")) if number % 2]
        plain = [block for block in fenced if block.startswith("\n")]
        unmarked += [(page.name, block) for block in plain if "\nlockstep " in block]
    assert not unmarked
