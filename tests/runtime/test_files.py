"""Files appear whole or not at all."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from runtime.checkpoint import Checkpoints
from runtime.errors import BadRequestError, JobFailedError
from runtime.files import (
    Outputs,
    check_apart,
    check_outlives,
    check_writable,
    refusing,
    whole_file,
    whole_files,
)


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


def test_what_appears_meanwhile_is_kept_and_so_is_what_was_made(tmp_path: Path) -> None:
    paths = [tmp_path / "a.json", tmp_path / "a.mp4"]
    (tmp_path / "a.2.json").write_text("mine")
    said = r"'.*a\.mp4' was made by somebody else meanwhile, and stays; .*'.*a\.3\.json', '.*a\.3\.mp4'"
    with pytest.raises(JobFailedError, match=said), whole_files(paths, overwrite=False) as temporaries:
        for temporary in temporaries:
            temporary.write_text("ours")
        paths[1].write_text("theirs")
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert found == {"a.2.json": "mine", "a.mp4": "theirs", "a.3.json": "ours", "a.3.mp4": "ours"}
    with whole_files(paths, overwrite=True) as temporaries:
        for temporary in temporaries:
            temporary.write_text("new")
    assert [path.read_text() for path in paths] == ["new", "new"]


def test_the_one_who_is_second_by_a_hair_replaces_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looking first and writing then is not enough."""
    path, link = tmp_path / "a.json", os.link

    def late(source: Path, target: Path) -> None:
        path.write_text("theirs")
        link(source, target)

    monkeypatch.setattr(os, "link", late)
    with pytest.raises(JobFailedError, match="and stays"), whole_file(path, overwrite=False) as temporary:
        temporary.write_text("ours")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a.json": "theirs", "a.2.json": "ours"}


def test_a_file_system_without_hard_links_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with whole_file(tmp_path / "a.json", overwrite=False) as temporary:
        temporary.write_text("ours")
    with pytest.raises(JobFailedError), whole_file(tmp_path / "a.json", overwrite=False):
        pass
    assert (tmp_path / "a.json").read_text() == "ours"


def test_new_files_have_the_rights_of_new_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mask is the process's: asking for it changes it for all threads."""
    (tmp_path / "usual").touch()
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the mask was changed"))
    with whole_file(tmp_path / "a.json") as temporary:
        temporary.write_text("a")
    assert (tmp_path / "a.json").stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.parametrize("stem", ["x" * 250, "猫" * 83])
def test_the_longest_names_will_do(tmp_path: Path, stem: str) -> None:
    path = tmp_path / f"{stem}.mp4"
    check_writable(path, overwrite=False)
    with whole_file(path, overwrite=False) as temporary:
        temporary.write_text("a")
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(BadRequestError, match=r"out: '.*' given; File name too long"):
        check_writable(path.with_stem(stem + "xxxxx"), overwrite=False)


def test_only_a_regular_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "there.mp4").write_text("mine")
    (tmp_path / "link.mp4").symlink_to("there.mp4")
    (tmp_path / "nowhere.mp4").symlink_to("missing.mp4")
    os.mkfifo(tmp_path / "pipe.mp4")
    for name, said in {
        "link.mp4": "it is a link, give the name of the file itself: '.*there.mp4'",
        "nowhere.mp4": "it is a link",
        "pipe.mp4": "it is no regular file",
        "/dev/null": "it is no regular file",
        "": "it is a folder",
        "..": "it is a folder",
    }.items():
        with pytest.raises(BadRequestError, match=said):
            check_writable(tmp_path / name, overwrite=True)
        with pytest.raises(BadRequestError):
            check_writable(tmp_path / name, overwrite=False)
    assert stat.S_ISFIFO((tmp_path / "pipe.mp4").stat().st_mode)


@contextmanager
def nobody() -> Iterator[None]:
    """As a user who may not enter the tests' folders."""
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_folders_that_may_not_be_entered_are_refused(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o700)
    path = tmp_path / "closed" / "a.mp4"
    with nobody():
        with pytest.raises(BadRequestError, match=r"out: '.*' given; Permission denied"):
            check_writable(path, overwrite=False)
        with pytest.raises(BadRequestError, match=r"checkpoints: '.*' given; Permission denied"):
            Checkpoints(tmp_path / "closed" / "kept", every=1).check()
        said = r"config: '.*' given; Permission denied"
        with pytest.raises(BadRequestError, match=said), refusing("config", path):
            path.is_file()


def test_a_full_folder_is_refused_and_named(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))
    try:
        with pytest.raises(BadRequestError, match=r"out: cannot write in '.*': File too large"):
            check_writable(tmp_path / "a.mp4", overwrite=False)
        said = r"cannot write '.*a\.json': File too large"
        with pytest.raises(JobFailedError, match=said), whole_file(tmp_path / "a.json") as temporary:
            temporary.write_bytes(bytes(4096))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_is_an_input_is_refused(tmp_path: Path) -> None:
    """However it is called, and even where files may be replaced."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    start = tmp_path / "real" / "start.png"
    start.write_bytes(b"a picture")
    outputs = Outputs(tmp_path / "link" / "start.mp4", tmp_path / "link" / "start.json", overwrite=True)
    for given in (start, tmp_path / "real", tmp_path / "link" / ".." / "real" / "start.png"):
        with pytest.raises(BadRequestError, match=r"out: .*start\.png' given; it is image's"):
            check_apart(outputs.all(1), {given: "image"})
    check_apart(outputs.all(1), {tmp_path / "other.png": "image"})
    (tmp_path / "real" / "start.json").touch()
    named = Outputs.named(tmp_path / "a.mp4", tmp_path / "link" / "start.json", overwrite=True)
    with pytest.raises(BadRequestError, match=r"report: .*start\.json' given; it is lora's"):
        check_apart(named.all(1), {tmp_path / "real" / "start.json": "lora"})


def test_what_is_deleted_with_a_ray_job_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    packed.mkdir(parents=True)
    monkeypatch.chdir(packed)
    for path in (Path("a.mp4"), Path("sub/a.mp4"), packed / "a.mp4", Path("../a.mp4")):
        with pytest.raises(
            BadRequestError, match=r"queue: .* give an absolute path on a disk that the nodes"
        ):
            check_outlives(path, field="queue")
    check_outlives(tmp_path / "a.mp4", field="queue")
    check_outlives(Path("../../../a.mp4"), field="queue")
