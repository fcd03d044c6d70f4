"""Replaced shots are found, listed and removed; whatever is in use or not Lockstep's stays."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
from rich.console import Console

from launch import cli
from launch.film.make import make_film
from launch.film.prune import find_replaced, prune
from launch.film.shots import Film, plan_film
from launch.serve.queue import Queue
from runtime.engine import Engine
from runtime.errors import BadRequestError
from runtime.jobs.run import run_job

FILM = """\
title: Two shots
width: 64
height: 48
defaults: {steps: 2, spectrum: "off", frames: 5}
shots:
  - {id: one, prompt: a red circle}
  - {id: two, prompt: a blue square}
"""


@pytest.fixture
def board(tmp_path: Path) -> Path:
    path = tmp_path / "film.yaml"
    path.write_text(FILM)
    return path


def plan(board: Path, prompt: str = "a red circle") -> Film:
    """The film as it is with this prompt in its first shot."""
    board.write_text(FILM.replace("a red circle", prompt))
    return plan_film(board, out=board.parent / "film")


def make(film: Film, engine: Engine) -> str:
    """Make the missing shots in this process, and join the film; returns what is said."""
    (film.out / "shots").mkdir(parents=True, exist_ok=True)
    for number in film.missing:
        run_job(engine, film.job(number))
    console = Console(width=200)
    with console.capture() as capture:
        make_film(film, 1, console)
    return capture.get()


def files(film: Film, number: int) -> set[Path]:
    return {film.video(number).with_suffix(kind) for kind in (".mp4", ".json", ".png")}


def inside(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


def leave_checkpoint(film: Film, number: int) -> Path:
    """A checkpoint of a shot, as an interrupted job leaves it, and a user's file beside it."""
    generation = film.checkpoints(number).of("{}")
    generation.mkdir(parents=True)
    for name in ("part-00001-0.pt", "manifest-00001-0.json"):
        (generation / name).write_bytes(b"{}")
    (generation.parent / "thesis.tex").write_text("mine")
    return generation


def test_a_replaced_shot_is_told_of_listed_and_removed(
    board: Path, engine: Engine, capfd: pytest.CaptureFixture[str]
) -> None:
    old = plan(board)
    assert "replaced" not in make(old, engine)
    film = plan(board, "a green circle")
    said = make(film, engine)
    assert "1 replaced shot, " in said and "the same command with --prune removes them" in said
    mine = film.out / "shots" / "two-0123456789ab.mp4"
    mine.write_text("mine, though it looks like a shot")
    mine.with_suffix(".json").write_text('{"recipe": "0123456789ab", "videos": ["another.mp4"]}')
    before, gone = inside(film.out), files(old, 0)
    words = ["storyboard", str(board), "--out", str(film.out), "--prune"]
    assert cli.run([*words, "--dry-run"]) == 0
    listed = capfd.readouterr().out.splitlines()
    assert {film.out / line for line in listed[:-1]} == gone and listed[-1].startswith("1 replaced shot, ")
    assert inside(film.out) == before
    assert cli.run(words) == 0
    assert capfd.readouterr().out.splitlines() == listed
    assert before - inside(film.out) == gone
    assert cli.run(words) == 0
    assert capfd.readouterr().out == "no replaced shots\n"
    assert film.complete


def test_shots_in_use_stay(board: Path, engine: Engine) -> None:
    old = plan(board)
    make(old, engine)
    edited = plan(board, "a green circle")
    assert find_replaced(edited) == []  # the film that lies there was joined from the old shot
    make(edited, engine)
    with closing(Queue(old.out / "queue")) as queue:
        id = queue.submit(old.job(0), name=f"{old.video(0).stem}@0")
        assert prune(edited) == []  # a request will write it
        queue.cancel(id)
    assert [one.video for one in prune(edited)] == [old.video(0)]


def test_checkpoints_of_a_replaced_shot_go_too(board: Path) -> None:
    old, film = plan(board), plan(board, "a green circle")
    generation, used = leave_checkpoint(old, 0), leave_checkpoint(film, 0)
    [replaced] = prune(film)
    assert replaced.paths == [generation.parent] and replaced.bytes > 0
    assert inside(generation.parent) == {generation.parent / "thesis.tex"}
    assert len(inside(used)) == 2


def test_what_is_in_use_must_be_known(board: Path) -> None:
    old, film = plan(board), plan(board, "a green circle")
    generation = leave_checkpoint(old, 0)
    (film.out / "lockstep.lock").touch()
    (film.out / "manifest.json").write_text("{}")
    with pytest.raises(BadRequestError, match="does not say which shots the film was joined from"):
        prune(film)
    assert generation.exists()


def test_nothing_is_created_where_there_is_no_film(board: Path) -> None:
    film = plan(board)
    assert prune(film) == []
    assert not film.out.exists()
