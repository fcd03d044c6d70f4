"""A film's folder: one process makes a film in it, and what is a user's stays a user's."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from launch import cli
from launch.film.folder import check_out, held
from launch.film.make import _submit, make_film
from launch.film.shots import Film, plan_film
from launch.serve.entries import State
from launch.serve.queue import Queue
from launch.shell.terminal import Terminal
from runtime.engine import Engine
from runtime.errors import BadRequestError, JobFailedError
from runtime.jobs.defaults import COMPILE_TIMEOUT, DEFAULT_TIMEOUT
from runtime.jobs.run import run_job
from runtime.media.ffmpeg import file_url, run_ffmpeg
from tests.jobs import make_job

FILM = """\
title: "One </title><script>alert(1)</script> shot [/end]"
width: 64
height: 48
defaults: {steps: 2, spectrum: "off", frames: 5}
shots:
  - {id: one, prompt: "a <b>red</b> circle", title: "<i>One</i>"}
"""
OWN = ["film.mp4", "film.html", "poster.png", "contact-sheet.png", "manifest.json"]


@pytest.fixture
def board(tmp_path: Path) -> Path:
    path = tmp_path / "film.yaml"
    path.write_text(FILM)
    return path


def storyboard(board: Path, out: Path, *options: str) -> int:
    return cli.run(["storyboard", str(board), "--out", str(out), *options])


def render(film: Film, engine: Engine) -> None:
    """Make the shots in this process."""
    (film.out / "shots").mkdir(parents=True)
    for number in range(len(film.shots)):
        run_job(engine, film.job(number))


@contextmanager
def another_process_locks(path: Path) -> Iterator[None]:
    code = (
        "import fcntl, sys\nfile = open(sys.argv[1], 'a+')\nfcntl.flock(file, fcntl.LOCK_EX)\n"
        "print('held', flush=True)\nsys.stdin.read()"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdin=pipe, stdout=pipe) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        yield
        process.stdin.close()


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("lock", ["lockstep.lock", "queue/lock"])
def test_a_folder_in_use_is_refused_before_anything_in_it_changes(
    lock: str, board: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "film"
    with closing(Queue(out / "queue")) as queue:
        queue.submit(make_job(tmp_path / "other.mp4").absolute(), name="of-another-version-0123456789ab@0")
    with held(out):
        pass
    before = everything(out)
    with another_process_locks(out / lock):
        assert storyboard(board, out) == 2
    said = capfd.readouterr().err
    assert ("is in use: process" if lock == "lockstep.lock" else "another pool serves") in said
    if lock == "lockstep.lock":
        assert everything(out) == before
    with closing(Queue(out / "queue")) as queue:
        assert [(entry.name, entry.state, entry.unwanted) for entry in queue.entries()] == [
            ("of-another-version-0123456789ab@0", "waiting", False)
        ]


@pytest.mark.parametrize("options", [(), ("--dry-run",)])
def test_a_queue_of_the_users_is_not_a_films(
    options: tuple[str, ...], board: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """`queue` is the default of `lockstep queue`, beside which `--out .` would make a film."""
    with closing(Queue(board.parent / "queue")) as queue:
        queue.submit(make_job(board.parent / "other.mp4").absolute())
        assert storyboard(board, board.parent, *options) == 2
        said = capfd.readouterr().err
        assert "holds requests that are not shots of a film, such as 'request-1'; give another folder" in said
        assert [(entry.state, entry.unwanted) for entry in queue.entries()] == [("waiting", False)]
        queue.end(1, State.DONE)  # it is in nobody's way any more
        assert storyboard(board, board.parent, "--dry-run") == 0
        queue.submit(make_job(board.parent / "late.mp4").absolute())
        assert len(_submit(plan_film(board, out=board.parent), queue)) == 1  # while the film is made
        assert [entry.state for entry in queue.entries()] == ["done", "waiting", "waiting"]


def test_two_films_at_once_are_one_too_many(tmp_path: Path) -> None:
    with (
        held(tmp_path / "film"),
        pytest.raises(BadRequestError, match="is in use: process"),
        held(tmp_path / "film"),
    ):
        pass
    with held(tmp_path / "film"):  # and it is free again
        pass


@pytest.mark.parametrize("name", OWN)
def test_what_no_film_made_is_not_replaced(
    name: str, board: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "film"
    out.mkdir()
    (out / name).write_text("mine")
    assert storyboard(board, out) == 2
    assert f"{name} in it would be replaced, but Lockstep did not write it" in capfd.readouterr().err
    assert everything(out) == {name: b"mine"}


def test_foreign_files_survive_a_film(board: Path, tmp_path: Path, engine: Engine) -> None:
    film = plan_film(board, out=tmp_path)
    render(film, engine)
    kept = film.checkpoints(0).root
    kept.mkdir()
    mine = [tmp_path / "notes.txt", tmp_path / "shots" / "one.mp4", kept / "thesis.tex"]
    for path in mine:
        path.write_text("mine")
    assert make_film(film, 1, Terminal(quiet=True)) == tmp_path / "film.mp4"
    assert all(path.read_text() == "mine" for path in mine)
    assert {path.name for path in tmp_path.iterdir()} == {
        *OWN, "shots", "notes.txt", "film.yaml", "lockstep.lock"
    }  # fmt: skip
    page = (tmp_path / "film.html").read_text("utf-8")
    assert page.count("<script>") == 0 and page.count("</title>") == 1
    assert "<title>One &lt;/title&gt;&lt;script&gt;" in page
    assert "a &lt;b&gt;red" in page and "&lt;i&gt;One" in page
    report = film.video(0).with_suffix(".json")
    report.write_text("{}")
    with pytest.raises(JobFailedError, match=r"\.json' is not a report .*remove it"):
        make_film(film, 1, Terminal(quiet=True))


@pytest.mark.parametrize("field", ["storyboard", "audio"])
def test_a_film_does_not_replace_what_it_is_made_from(
    field: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "film"
    (out / "shots").mkdir(parents=True)
    board = out / "manifest.json" if field == "storyboard" else tmp_path / "film.yaml"
    board.write_text(FILM)
    track = out / "film.mp4"
    run_ffmpeg("-f", "lavfi", "-i", "sine=duration=1", file_url(track), doing="make a tone")
    options = ["--audio", str(track)] if field == "audio" else []
    assert storyboard(board, out / "." / "shots" / "..", *options) == 2
    said = capfd.readouterr().err
    assert "it would replace" in said and f"given for {field}: give another name" in said


@pytest.mark.parametrize("content", [b"", b"la la la"])
@pytest.mark.parametrize("options", [(), ("--dry-run",)])
def test_a_track_that_cannot_be_heard_is_refused_before_a_shot_is_made(
    content: bytes, options: tuple[str, ...], board: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    track = tmp_path / "take:2.mp3"
    track.write_bytes(content)
    assert storyboard(board, tmp_path / "film", "--audio", str(track), *options) == 2
    assert f"audio: {str(track)!r} given; it has no readable sound" in capfd.readouterr().err
    assert not (tmp_path / "film").exists()


def test_compiled_shots_have_time_to_compile(board: Path, tmp_path: Path) -> None:
    config = tmp_path / "compiled.yaml"
    config.write_text(
        "model: wan-tiny\ncompile: true\nfps: 8\ndefaults: {width: 64, height: 48, frames: 5}\n"
    )
    board.write_text(FILM.replace("defaults: {", "defaults: {config: compiled.yaml, "))
    assert plan_film(board, out=tmp_path / "film").job(0).timeout == COMPILE_TIMEOUT
    board.write_text(FILM)
    assert plan_film(board, out=tmp_path / "film").job(0).timeout == DEFAULT_TIMEOUT


def test_a_folder_that_cannot_be_looked_into_is_refused_at_once(board: Path) -> None:
    with pytest.raises(BadRequestError, match=r"out: '.*' given; File name too long"):
        plan_film(board, out=board.parent / ("x" * 300))


def test_a_lock_that_is_not_a_films_stays_as_it_is(tmp_path: Path) -> None:
    lock = tmp_path / "lockstep.lock"
    lock.write_text("my notes")
    with pytest.raises(BadRequestError, match="is not Lockstep's"), held(tmp_path):
        pass
    assert lock.read_text() == "my notes"
    lock.unlink()
    lock.symlink_to(tmp_path / "none" / "lock")
    with pytest.raises(BadRequestError, match="is not Lockstep's"), held(tmp_path):
        pass
    assert lock.is_symlink()


def test_a_request_that_waits_is_made_as_it_is_asked_for_now(
    board: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    out = tmp_path / "film"
    assert storyboard(board, out, "--ranks", "60000") == 2
    assert "60000" in capfd.readouterr().err
    with closing(Queue(out / "queue")) as queue:
        assert queue.entries() == []
        many, one = (plan_film(board, out=out, ranks=ranks) for ranks in (64, 1))
        before = _submit(many, queue)
        assert _submit(many, queue) == before
        after = _submit(one, queue)
        assert [(entry.state, entry.job.world) for entry in queue.entries()] == [
            ("cancelled", 64), ("waiting", 1)
        ]  # fmt: skip
        assert after[0] != before[0]


@pytest.mark.parametrize(
    ("name", "said"), [("shots", "File exists"), *((name, "it is a folder") for name in OWN)]
)
def test_what_is_in_the_way_is_found_before_a_shot_is_made(name: str, said: str, tmp_path: Path) -> None:
    out = tmp_path / "film"
    with held(out):
        pass
    (out / "shots").rmdir()
    (out / name).write_text("mine") if name == "shots" else (out / name).mkdir()
    with pytest.raises(BadRequestError, match=rf"out: '.*{name}' given; {said}"), held(out):
        pass
    with pytest.raises(BadRequestError, match=rf"out: '.*{name}' given; {said}"):
        check_out(out)
    assert (out / name).exists()


def test_a_dry_run_looks_at_the_folder_as_the_film_would_and_makes_nothing(
    board: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "foreign"
    out.mkdir()
    (out / "film.mp4").write_text("mine")
    assert storyboard(board, out, "--dry-run") == 2
    assert "film.mp4 in it would be replaced, but Lockstep did not write it" in capfd.readouterr().err
    for name in ("film.yaml", "film.yaml/in/it"):
        assert storyboard(board, tmp_path / name, "--dry-run") == 2
        assert "out: " in capfd.readouterr().err
    assert storyboard(board, tmp_path / "new" / "film", "--dry-run") == 0
    assert everything(tmp_path) == {"film.yaml": FILM.encode(), "foreign/film.mp4": b"mine"}
    assert not (tmp_path / "new").exists()
