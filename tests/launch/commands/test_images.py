"""Images on the command line and in storyboards, for a model that makes videos from them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from launch import cli
from launch.film.shots import plan_film
from runtime.errors import BadRequestError
from runtime.media.frames import read_frames
from runtime.request.config import Config
from tests.conditioned import config_of, write_i2v, write_image, write_vace

FILM = """\
title: From pictures
width: 64
height: 48
defaults: {config: i2v.yaml, steps: 4, spectrum: "off", frames: 9}
shots:
  - {id: one, prompt: a red circle, image: start.png}
  - {id: two, prompt: a red circle, image: start.png, frames: 17}
"""


@pytest.fixture
def folder(config: Config, tmp_path: Path) -> Path:
    """Holds a model, its config, an image and a storyboard."""
    own = config_of(config, write_i2v(tmp_path / "model"))
    (tmp_path / "i2v.yaml").write_text(yaml.safe_dump(own.model_dump(mode="json")))
    write_image(tmp_path / "start.png")
    (tmp_path / "film.yaml").write_text(FILM)
    return tmp_path


def test_a_video_is_made_from_an_image(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    made = ["generate", "a red circle", "--size", "64x48", "--frames", "17", "--steps", "4"]
    made += ["--spectrum", "off", "--config", "i2v.yaml", "--out", "a.mp4"]
    assert cli.run(made) == 2
    assert "image: missing" in capsys.readouterr().err
    assert cli.run([*made, "--image", "none.png"]) == 2
    assert "image: 'none.png' given; it cannot be read" in capsys.readouterr().err
    assert cli.run([*made, "--image", "start.png"]) == 0
    report = json.loads(Path("a.json").read_text())
    assert (report["windows"], report["steps"], report["nfe"]["cond"]) == (2, 8, 8)
    assert report["request"]["image"] == "start.png"
    assert len(read_frames(Path("a.mp4"))) == 17
    assert Path("a.png").is_file()


@pytest.mark.timeout(120)
def test_an_image_serves_comparisons_and_calibrations(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    Path("prompts.txt").write_text("a red circle\na blue square\n")
    small = ["--config", "i2v.yaml", "--size", "64x48", "--frames", "5", "--steps", "6"]
    compare = ["compare", "a red circle", *small, "--preset", "mine.yaml", "--out", "side.mp4"]
    calibrate = ["calibrate", *small, "--prompts", "prompts.txt", "--out", "mine.json"]
    for command in (calibrate, ["compare", "a red circle", *small]):
        assert cli.run([*command, "--image", "none.png"]) == 2
        assert "image: 'none.png' given; it cannot be read" in capsys.readouterr().err
    assert cli.run([*calibrate, "--image", "start.png"]) == 0
    assert cli.run(["plan", "mine.json", "--nfe", "4", "--preset", "mine.yaml"]) == 0
    assert cli.run([*compare, "--image", "start.png"]) == 0
    _, planned = json.loads(Path("side.json").read_text())["results"]
    assert planned["nfe"] >= 4 and planned["quality"]["psnr"] > 10


def test_a_model_without_use_for_an_image_refuses_it(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(folder / "b.mp4")
    assert cli.run(["generate", "a", "--image", str(folder / "start.png"), "--out", out]) == 2
    assert "wan-tiny makes videos from text alone" in capsys.readouterr().err


def test_a_shot_is_made_again_when_its_image_changes(folder: Path) -> None:
    def digests() -> list[str]:
        return [one.recipe.digest for one in plan_film(folder / "film.yaml", out=folder / "film").shots]

    before = digests()
    assert digests() == before
    write_image(folder / "other.png", seed=1)
    (folder / "film.yaml").write_text(FILM.replace("image: start.png}", "image: other.png}"))
    after = digests()
    assert after[0] != before[0] and after[1] == before[1]
    write_image(folder / "other.png", seed=0)  # the name does not count, what it shows does
    assert digests() == before


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (("image: start.png}", "image: none.png}"), "line 6, shot 'one': image: .*none.png.* cannot be read"),
        ((", image: start.png}", "}"), "shot 'one': image: missing"),
        (("config: i2v.yaml, ", ""), "shot 'two': image: .* makes videos from text alone"),
    ],
)
def test_a_shot_whose_image_does_not_fit_is_named(folder: Path, changed: tuple[str, str], said: str) -> None:
    (folder / "film.yaml").write_text(FILM.replace(*changed))
    with pytest.raises(BadRequestError, match=said):
        plan_film(folder / "film.yaml", out=folder / "film")


def test_shots_of_vace_may_have_an_image(config: Config, tmp_path: Path) -> None:
    own = config_of(config, write_vace(tmp_path / "model"))
    (tmp_path / "vace.yaml").write_text(yaml.safe_dump(own.model_dump(mode="json")))
    image = write_image(tmp_path / "start.png")
    board = FILM.replace("i2v.yaml", "vace.yaml").replace("red circle, image: start.png}", "red circle}")
    (tmp_path / "film.yaml").write_text(board)
    shots = plan_film(tmp_path / "film.yaml", out=tmp_path / "film").shots
    assert [one.request.image for one in shots] == [None, str(image)]
