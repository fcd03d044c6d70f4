"""A film of six shots, and what can die meanwhile: it goes on, and ends as if nothing had happened."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import psutil
import pytest

from launch.film.shots import Film, plan_film
from launch.serve.queue import Queue
from runtime.media.frames import read_frames

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

SHOTS = 6
FILM = """\
title: Six shots
width: 64
height: 48
defaults: {steps: 40, spectrum: "off", frames: 5}
shots:
""" + "".join(
    f"  - {{id: s{number}, prompt: a {colour} circle moving left on a black background}}\n"
    for number, colour in enumerate(("red", "green", "blue", "yellow", "cyan", "magenta"))
)


def planned(folder: Path) -> Film:
    board = folder / "film.yaml"
    board.write_text(FILM)
    return plan_film(board, out=folder / "film")


@contextmanager
def making(film: Film) -> Iterator[subprocess.Popen[str]]:
    """`lockstep storyboard` on two replicas, with a Ray of its own."""
    board = film.out.parent / "film.yaml"
    command = [sys.executable, "-m", "launch", "storyboard", str(board), "--out", str(film.out)]
    clean = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with subprocess.Popen(
        [*command, "--replicas", "2"], stderr=subprocess.PIPE, text=True, env=clean
    ) as made:
        try:
            yield made
        finally:
            made.kill()


def done(film: Film) -> dict[int, int]:
    """Shots that are there, and when they were written."""
    return {n: film.video(n).stat().st_mtime_ns for n in range(SHOTS) if film.done(n)}


def frames_digest(film: Film) -> str:
    return hashlib.sha256(read_frames(film.out / "film.mp4").tobytes()).hexdigest()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    film = planned(tmp_path_factory.mktemp("undisturbed"))
    with making(film) as made:
        assert made.wait(200) == 0, made.stderr and made.stderr.read()
    return frames_digest(film)


def kill_driver(made: subprocess.Popen[str], film: Film) -> None:
    made.kill()


def kill_replica(made: subprocess.Popen[str], film: Film) -> None:
    with closing(Queue(film.out / "queue")) as queue:
        busy = next(replica for replica in queue.replicas() if replica.state == "working")
    os.kill(busy.places[0]["pid"], signal.SIGKILL)


def kill_ray(made: subprocess.Popen[str], film: Film) -> None:
    """Every process of the command's Ray, its driver included; the command goes on with another Ray."""
    for process in psutil.Process(made.pid).children(recursive=True):
        process.kill()


@pytest.mark.parametrize(
    ("kill", "survives"),
    [(kill_driver, False), (kill_replica, True), (kill_ray, True)],
    ids=["driver", "replica", "ray"],
)
def test_a_killed_film_goes_on_and_is_the_undisturbed_one(
    kill: Callable[[subprocess.Popen[str], Film], None], survives: bool, undisturbed: str, tmp_path: Path
) -> None:
    film = planned(tmp_path)
    with making(film) as made:
        while not running_after(film, 2):
            assert made.poll() is None, made.stderr and made.stderr.read()
            time.sleep(0.02)
        before = done(film)
        kill(made, film)
        made.communicate(timeout=200)  # whatever dies, it ends
    assert (made.returncode == 0) == survives
    assert survives or len(done(film)) < SHOTS
    with making(film) as again:
        _, said = again.communicate(timeout=200)
    assert again.returncode == 0, said
    assert survives == (f"0 of {SHOTS} shots to make" in said)
    after = done(film)
    assert {number: after[number] for number in before} == before
    assert frames_digest(film) == undisturbed
    assert not list((film.out / "shots").glob("*.checkpoints"))


def running_after(film: Film, finished: int) -> bool:
    """Whether so many shots are there, not all of them, and another has done a step."""
    if not (film.out / "queue").is_dir() or not finished <= len(done(film)) < SHOTS:
        return False
    with closing(Queue(film.out / "queue")) as queue:
        return any(entry.state == "running" and entry.progress.step > 1 for entry in queue.entries())
