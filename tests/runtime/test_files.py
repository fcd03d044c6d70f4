"""Files appear whole or not at all."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.errors import BadRequestError
from runtime.files import check_writable, whole_file


def test_the_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with whole_file(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
        assert temporary.suffix == ".json"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_and_nothing_is_lost_when_the_block_raises(
    tmp_path: Path, error: type[BaseException]
) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(error), whole_file(path) as temporary:
        temporary.write_text("ne")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_output_that_exists_needs_leave(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.touch()
    with pytest.raises(BadRequestError, match=r"a\.mp4' exists; give another name or --overwrite"):
        check_writable(path, overwrite=False)
    check_writable(path, overwrite=True)


def test_folders_are_made_and_left_clean(tmp_path: Path) -> None:
    check_writable(tmp_path / "deep" / "er" / "a.mp4", overwrite=False)
    assert list((tmp_path / "deep" / "er").iterdir()) == []


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "a.mp4", Path("/proc/a.mp4")):  # neither takes files, not even from root
        with pytest.raises(BadRequestError, match="cannot write in"):
            check_writable(path, overwrite=False)
    with pytest.raises(BadRequestError, match="it is a folder"):
        check_writable(tmp_path, overwrite=True)


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    orphan = tmp_path / f".a.{socket.gethostname()}.{dead.pid}.xyz.part.mp4"
    alive = tmp_path / f".a.{socket.gethostname()}.1.xyz.part.mp4"
    other = tmp_path / f".b.{socket.gethostname()}.{dead.pid}.xyz.part.mp4"
    for file in (orphan, alive, other):
        file.write_bytes(b"half")
    with whole_file(path) as temporary:
        temporary.write_bytes(b"whole")
    assert {file.name for file in tmp_path.iterdir()} == {"a.mp4", alive.name, other.name}
