"""Files appear whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from runtime.checkpoint.folder import Checkpoints
from runtime.errors import BadRequestError, JobFailedError
from runtime.files.atomic import whole_file, whole_files
from runtime.files.checks import check_apart, check_outlives, check_writable, refusing
from runtime.request.outputs import Outputs


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
    with pytest.raises(
        BadRequestError,
        match=r"a\.mp4' exists; give another name, or --overwrite \(in Python: overwrite=True\)",
    ):
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


_KILLED = """
import os, socket, sys
from pathlib import Path
socket.gethostname = lambda: sys.argv[2]
from runtime.files.atomic import whole_file
with whole_file(Path(sys.argv[1])) as temporary:
    temporary.write_bytes(b"half")
    print(temporary.name, flush=True)
    sys.stdin.readline()
    os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("host", [socket.gethostname(), "renamed.example"])
def test_what_a_killed_process_left_is_removed_by_the_next_and_by_nobody_before(
    tmp_path: Path, host: str
) -> None:
    """Whatever number the process has, or seems to have from another container, and whatever its machine is
    called by now."""
    path = tmp_path / "a.mp4"
    command = [sys.executable, "-c", _KILLED, str(path), host]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdin is not None and writer.stdout is not None
        name = writer.stdout.readline().strip()
        assert name.startswith(f".a.{host}.{writer.pid}.")
        seen = name.replace(f".{writer.pid}.", ".4194305.")  # which no process has, as seen from elsewhere
        (tmp_path / name).rename(tmp_path / seen)
        with whole_file(path) as temporary:
            temporary.write_bytes(b"first")
        assert (tmp_path / seen).read_bytes() == b"half"
        (tmp_path / seen).rename(tmp_path / name.replace(f".{writer.pid}.", f".{os.getpid()}."))  # used again
        writer.stdin.close()
        assert writer.wait(60) == -9
    foreign = [".a.mine.part.mp4", f".b.{host}.4194305.01234567.part.mp4", ".a.part.mp4"]
    for other in foreign:
        (tmp_path / other).write_text("mine")
    pipe = f".a.{host}.4194305.01234567.part.mp4"
    os.mkfifo(tmp_path / pipe)
    with whole_file(path) as temporary:
        temporary.write_bytes(b"whole")
    assert path.read_bytes() == b"whole"
    assert {file.name for file in tmp_path.iterdir()} == {"a.mp4", pipe, *foreign}


_ENDED = """
import os, resource, signal, sys
from pathlib import Path
from runtime.files.atomic import whole_files
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
with whole_files([Path(name) for name in sys.argv[2:]], overwrite=True) as temporaries:
    for temporary in temporaries:
        temporary.write_bytes(b"half")
    if sys.argv[1] == "XCPU":  # as a limit of processor time sends it
        resource.setrlimit(resource.RLIMIT_CPU, (0, 60))
        while True:
            pass
    os.kill(os.getpid(), signal.Signals["SIG" + sys.argv[1]])
"""


@pytest.mark.parametrize("name", ["QUIT", "USR1", "USR2", "ALRM", "XCPU", "ABRT"])
def test_what_a_signal_that_nobody_handles_leaves_is_removed_by_the_next(tmp_path: Path, name: str) -> None:
    """Such a process ends at once, with its temporary files: only the lock on them ends with it."""
    paths = [tmp_path / "a.mp4", tmp_path / "a.json"]
    done = subprocess.run([sys.executable, "-c", _ENDED, name, *map(str, paths)], check=False, timeout=60)
    assert done.returncode == -signal.Signals[f"SIG{name}"]
    assert len(list(tmp_path.glob(".a.*.part.*"))) == 2
    with whole_files(paths, overwrite=False) as temporaries:
        for temporary in temporaries:
            temporary.write_bytes(b"whole")
    assert sorted(tmp_path.iterdir()) == sorted(paths)


def test_a_reader_that_is_gone_ends_no_writer(tmp_path: Path) -> None:
    """Python ignores SIGPIPE."""
    path = str(tmp_path / "a.mp4")
    assert (
        subprocess.run([sys.executable, "-c", _ENDED, "PIPE", path], check=False, timeout=60).returncode == 0
    )
    assert [one.name for one in tmp_path.iterdir()] == ["a.mp4"]


def test_a_temporary_file_that_is_taken_for_an_orphan_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock, taken = fcntl.flock, []

    def late(descriptor: int, operation: int) -> None:
        if not taken:
            taken.extend(tmp_path.iterdir())
            taken[0].unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with whole_file(tmp_path / "a.json") as temporary:
        assert temporary not in taken
        temporary.write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_file_system_without_locks_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with whole_file(tmp_path / "a.json") as one, whole_file(tmp_path / "a.json") as other:
        one.write_text("one")
        other.write_text("other")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_what_appears_meanwhile_is_kept_and_so_is_what_was_made(tmp_path: Path) -> None:
    paths = [tmp_path / "a.json", tmp_path / "a.mp4"]
    (tmp_path / "a.2.json").write_text("mine")
    said = (
        r"'.*a\.mp4' was created by another process meanwhile and was kept; .*'.*a\.3\.json', '.*a\.3\.mp4'"
    )
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


def test_a_folder_that_appears_meanwhile_is_kept_and_so_is_what_was_made(tmp_path: Path) -> None:
    """Nothing is replaced by half of the files, even where files may be replaced."""
    paths = [tmp_path / "a.json", tmp_path / "a.mp4"]
    paths[0].write_text("earlier")
    said = r"'.*a\.mp4' was created by another process meanwhile and was kept; .*'.*a\.2\.mp4'"
    with pytest.raises(JobFailedError, match=said), whole_files(paths, overwrite=True) as temporaries:
        for temporary in temporaries:
            temporary.write_text("ours")
        paths[1].mkdir()
        (paths[1] / "theirs").touch()
    found = {path.name: path.read_text() for path in tmp_path.iterdir() if path.is_file()}
    assert found == {"a.json": "earlier", "a.2.json": "ours", "a.2.mp4": "ours"}
    assert [path.name for path in paths[1].iterdir()] == ["theirs"]


def test_the_one_who_is_second_by_a_hair_replaces_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looking first and writing then is not enough."""
    path, link = tmp_path / "a.json", os.link

    def late(source: Path, target: Path) -> None:
        path.write_text("theirs")
        link(source, target)

    monkeypatch.setattr(os, "link", late)
    with pytest.raises(JobFailedError, match="and was kept"), whole_file(path, overwrite=False) as temporary:
        temporary.write_text("ours")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a.json": "theirs", "a.2.json": "ours"}


def test_files_that_belong_together_stay_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a report would name a video that is somebody else's."""
    paths, link = [tmp_path / "a.json", tmp_path / "a.mp4"], os.link

    def late(source: Path, target: Path) -> None:
        if target == paths[1]:
            paths[1].write_text("theirs")
        link(source, target)

    monkeypatch.setattr(os, "link", late)
    said = r"'.*a\.mp4' was created by another process"
    with pytest.raises(JobFailedError, match=said), whole_files(paths, overwrite=False) as temporaries:
        for temporary in temporaries:
            temporary.write_text("ours")
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert found == {"a.mp4": "theirs", "a.2.json": "ours", "a.2.mp4": "ours"}


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
    (tmp_path / "circle.mp4").symlink_to("circle.mp4")
    os.mkfifo(tmp_path / "pipe.mp4")
    for name, said in {
        "link.mp4": "it is a symbolic link; give the name of the file itself: '.*there.mp4'",
        "nowhere.mp4": "it is a symbolic link",
        "circle.mp4": "it is a symbolic link",
        "pipe.mp4": "it is not a regular file",
        "/dev/null": "it is not a regular file",
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
        with pytest.raises(BadRequestError, match=r"out: .*start\.png' given; .* given for image"):
            check_apart(outputs.all(1), {given: "image"})
    check_apart(outputs.all(1), {tmp_path / "other.png": "image"})
    (tmp_path / "real" / "start.json").touch()
    named = Outputs.named(tmp_path / "a.mp4", tmp_path / "link" / "start.json", overwrite=True)
    with pytest.raises(BadRequestError, match=r"report: .*start\.json' given; .* given for lora"):
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
