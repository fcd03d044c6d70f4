"""`lockstep storyboard` on a real local Ray: a film, made again only where it changed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from launch import cli
from launch.film.shots import plan_film
from runtime.media.frames import read_frames
from tests.forked import Command

pytestmark = [pytest.mark.alone, pytest.mark.timeout(240)]

IDS = ("one", "two", "three")
FILM = """\
title: Shapes at play
width: 64
height: 48
defaults: {steps: 6, spectrum: paper, frames: 9}
shots:
  - {id: one, prompt: a red circle moving left on a black background}
  - {id: two, prompt: a blue square growing on a black background, frames: 25}
  - id: three
    prompt: a green triangle moving up on a gray background
    transition: {kind: crossfade, frames: 3}
"""


def make(*arguments: str) -> int:
    """In a process of its own: those of other tests have used Ray, and its threads do not survive a fork."""
    clean = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return Command(["storyboard", *arguments], env=clean).wait()


def run(*arguments: str) -> int:
    return cli.run(["storyboard", *arguments])


def videos(out: Path) -> dict[str, tuple[str, int]]:
    """Shot → its file and when it was written."""
    found = sorted((out / "shots").glob("*.mp4"), key=lambda path: path.stat().st_mtime_ns)
    return {path.name.rpartition("-")[0]: (path.name, path.stat().st_mtime_ns) for path in found}


def test_a_film_is_made_and_made_again_where_it_changed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    board, out = tmp_path / "film.yaml", tmp_path / "film"
    board.write_text(FILM)
    assert run(str(board), "--out", str(out), "--dry-run") == 0
    table = " ".join(capfd.readouterr().out.split())
    assert table.count("to do") == 4 and "unknown" in table and "3 shots, 40 frames" in table
    assert not out.exists()
    assert plan_film(board, out=out, only=["two"]).missing == [1]

    assert make(str(board), "--out", str(out), "--replicas", "2") == 0
    stdout, stderr = capfd.readouterr()
    assert stdout == f"{out / 'film.mp4'}\n"
    assert "3 of 3 shots to make" in stderr
    made = videos(out)
    assert made.keys() == set(IDS)
    assert len(read_frames(out / "film.mp4")) == 9 + 25 + 9 - 3
    assert json.loads((out / "shots" / made["two"][0].replace("mp4", "json")).read_text())["windows"] == 2
    manifest = json.loads((out / "manifest.json").read_text())
    assert [shot["start"] for shot in manifest["shots"]] == [0, 9, 31]
    assert [shot["file"] for shot in manifest["shots"]] == [
        f"shots/{made[i][0]}" for i in ("one", "two", "three")
    ]
    assert {path.name for path in out.iterdir()} == {
        "shots", "queue", "film.mp4", "film.html", "poster.png", "contact-sheet.png", "manifest.json",
        "lockstep.lock",
    }  # fmt: skip

    board.write_text(FILM.replace("a green triangle", "a red triangle"))
    assert run(str(board), "--out", str(out), "--only", "two") == 0  # which is there
    stdout, stderr = capfd.readouterr()
    assert stdout == "" and "not joined" in stderr
    assert make(str(board), "--out", str(out)) == 0
    assert "1 of 3 shots to make" in capfd.readouterr().err
    again = videos(out)
    assert (again["one"], again["two"]) == (made["one"], made["two"])
    assert again["three"] != made["three"]
    assert run(str(board), "--out", str(out), "--dry-run") == 0
    assert capfd.readouterr().out.count("done") == 3
    assert plan_film(board, out=out).missing == []
    monkeypatch.setattr("runtime.recipe.code_version", lambda: "0.1.0+other")
    assert plan_film(board, out=out).missing == [0, 1, 2]


def test_a_bad_storyboard_exits_2_and_makes_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    board, out = tmp_path / "film.yaml", tmp_path / "film"
    board.write_text(FILM.replace("frames: 25", "frames: 26"))
    for arguments, said in (
        ([str(board), "--out", str(out)], "line 7, shot 'two': frames: 26 given"),
        ([str(board)], "give the file, and --out"),
        ([str(tmp_path / "none.yaml"), "--out", str(out)], "cannot be read"),
    ):
        assert run(*arguments) == 2
        assert said in capfd.readouterr().err
    board.write_text(FILM)
    assert run(str(board), "--out", str(out), "--only", "four") == 2
    assert "only: four given; the shots are one, two, three" in capfd.readouterr().err
    assert run(str(board), "--out", str(out), "--audio", str(tmp_path / "none.wav")) == 2
    assert "audio" in capfd.readouterr().err
    assert not out.exists()


def test_the_schema_is_that_of_the_file(capfd: pytest.CaptureFixture[str]) -> None:
    assert run("--schema") == 0
    schema = json.loads(capfd.readouterr().out)
    assert schema["required"] == ["title", "shots"]
    assert "transition" in schema["$defs"]["Shot"]["properties"]
