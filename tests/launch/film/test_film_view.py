"""What is seen of a film while it is made."""

from __future__ import annotations

import io
import sqlite3
from contextlib import closing
from pathlib import Path

from rich.console import Console

from launch.film.shots import Film, plan_film
from launch.film.view import film_table, shown_live
from launch.serve.entries import Progress, State
from launch.serve.queue import Queue

FILM = """\
title: Three shots
defaults: {steps: 6, spectrum: paper, frames: 9}
shots:
  - {id: one, prompt: a}
  - {id: two, prompt: b}
  - {id: three, prompt: c}
"""


def planned(folder: Path) -> Film:
    (folder / "film.yaml").write_text(FILM)
    return plan_film(folder / "film.yaml", out=folder / "film")


def lines_of(console: Console) -> list[str]:
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return [" ".join(line.replace("│", " ").replace("━", " ").split()) for line in text.splitlines()]


def written(film: Film, queue: Queue, requests: dict[int, int]) -> list[str]:
    console = Console(file=io.StringIO(), width=120)
    console.print(film_table(film, {number: queue.entry(id) for number, id in requests.items()}, ()))
    return lines_of(console)


def test_every_shot_is_shown_with_its_state_step_and_replica(tmp_path: Path) -> None:
    film = planned(tmp_path)
    with closing(Queue(tmp_path / "queue")) as queue:
        requests = {number: queue.submit(film.job(number)) for number in (0, 1)}
        assert queue.take(7) is not None
        queue.report(requests[0], Progress("paper", 3, 6, 2, 75.0))
        lines = written(film, queue, requests)
        assert "one running 2 1:15 min 7" in lines
        assert "two waiting" in lines
        assert "three not selected" in lines
        assert "0 of 3 shots" in lines
        queue.end(requests[0], State.DONE)
        assert "1 of 3 shots" in written(film, queue, requests)


def test_a_terminal_shows_it_while_it_is_made_and_a_log_does_not(tmp_path: Path) -> None:
    film = planned(tmp_path)
    with closing(Queue(tmp_path / "queue")) as queue:
        requests = {0: queue.submit(film.job(0))}
        shown = []
        for terminal in (True, False):
            console = Console(file=io.StringIO(), width=120, force_terminal=terminal)
            with shown_live(console, film, queue, requests):
                pass
            shown.append(console.file.getvalue())  # type: ignore[attr-defined]
    assert "waiting" in shown[0] and shown[1] == ""


def test_a_queue_that_cannot_be_read_just_then_ends_no_film(tmp_path: Path) -> None:
    film = planned(tmp_path)
    with closing(Queue(tmp_path / "queue")) as queue:
        requests = {0: queue.submit(film.job(0))}
        console = Console(file=io.StringIO(), width=120, force_terminal=True)
        with (
            shown_live(console, film, queue, requests),
            closing(sqlite3.connect(queue.folder / "queue.sqlite")) as other,
        ):
            other.execute("DROP TABLE requests")
            other.commit()


def test_of_a_long_film_the_shots_are_shown_that_are_being_made(tmp_path: Path) -> None:
    ids = [f"s{number}" for number in range(300)]
    shots = "".join(f"  - {{id: {id}, prompt: a}}\n" for id in ids)
    (tmp_path / "film.yaml").write_text(FILM.partition("  - ")[0] + shots)
    film = plan_film(tmp_path / "film.yaml", out=tmp_path / "film")
    with closing(Queue(tmp_path / "queue")) as queue:
        entry = queue.entry(queue.submit(film.job(200)))
    console = Console(file=io.StringIO(), width=120)
    console.print(film_table(film, {200: entry}, range(200)))
    lines = lines_of(console)
    assert "s200 waiting" in lines and "200 of 300 shots" in lines
    assert len(lines) < 60
