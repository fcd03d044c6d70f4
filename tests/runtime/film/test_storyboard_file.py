"""Storyboard files: what they mean, and where they are wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from runtime.errors import BadRequestError
from runtime.film.storyboard import fade_of, load_storyboard
from runtime.request.config import Lora
from runtime.request.images import image_digest
from tests.places import ROOT

FILM = """\
title: Shapes at play
width: 64
height: 48
defaults: {steps: 6, spectrum: paper, negative: blurry}
shots:
  - id: one
    prompt: a red circle moving left on a black background
    frames: 9
  - id: two
    title: The second
    prompt: a blue square growing on a black background
    seconds: 4
    seed: 5
    spectrum: "off"
    transition: {kind: crossfade, frames: 4}
"""
CONFIGS = ROOT / "configs"
LORA = {
    "transformer.blocks.0.attn1.to_q.lora_A.weight": torch.ones(1, 192),
    "transformer.blocks.0.attn1.to_q.lora_B.weight": torch.ones(192, 1),
}


def write(folder: Path, text: str = FILM) -> Path:
    path = folder / "film.yaml"
    path.write_text(text)
    return path


def test_shots_take_what_they_do_not_say_from_the_defaults(tmp_path: Path) -> None:
    board, (one, two) = load_storyboard(write(tmp_path))
    assert board.title == "Shapes at play"
    assert (one.request.width, one.request.height, one.request.frames, one.request.steps) == (64, 48, 9, 6)
    assert (one.request.negative, one.request.spectrum, two.request.spectrum) == ("blurry", "paper", "off")
    assert two.request.frames == 33  # 4 s at 8 frames per second, the nearest 4k + 1
    assert two.request.seed == 5
    assert (one.shot.chapter, two.shot.chapter) == ("one", "The second")
    assert (fade_of(one.shot), fade_of(two.shot)) == (0, 4)
    assert (one.config, one.fps) == ("wan-tiny", 8)


def test_a_seed_follows_from_the_id_and_not_from_the_place(tmp_path: Path) -> None:
    _, shots = load_storyboard(write(tmp_path))
    head, one, two = FILM.partition("  - id: one")[0], *FILM.partition("  - id: one")[2].split("  - id: two")
    two = two.replace("transition: {kind: crossfade, frames: 4}", "")
    _, turned = load_storyboard(write(tmp_path, f"{head}  - id: two{two}\n  - id: one{one}"))
    assert turned[1].request == shots[0].request


def test_presets_and_configs_are_found_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("schedule: {kind: full}\n")
    _, shots = load_storyboard(write(tmp_path, FILM.replace("spectrum: paper", "spectrum: mine.yaml")))
    assert shots[0].request.spectrum == str(tmp_path / "mine.yaml")


def test_a_lora_and_prompts_that_change_are_the_shots_own(tmp_path: Path) -> None:
    save_file(LORA, tmp_path / "a.safetensors")
    own = "seed: 5\n    lora: {file: a.safetensors, scale: 0.5}\n    travel: [{at: 0.5, prompt: b}]"
    _, (one, two) = load_storyboard(write(tmp_path, FILM.replace("seed: 5", own)))
    assert one.settings.lora == () and one.request.travel == ()
    assert two.settings.lora == (Lora(file=str(tmp_path / "a.safetensors"), scale=0.5),)
    assert [(point.at, point.prompt) for point in two.request.travel] == [(0.5, "b")]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("seed: 5", "sead: 5", "line 13, shot 'two': sead: unknown field; did you mean seed?"),
        ("frames: 9", "frames: 10", "line 8, shot 'one': frames: 10 given; must be 4k + 1"),
        ("id: two", "id: one", "the ids one are used more than once"),
        ("id: two", "id: Two!", "line 9, shot 'Two!': id: 'Two!' given; must have at most 60 lower"),
        ("frames: 4}", "frames: 40}", "line 9, shot 'two': transition: 40 frames fade, and the shot has 33"),
        ("seconds: 4", "seconds: 4\n    frames: 5", "shot 'two': give seconds or frames, not both"),
        ("seed: 5", "config: nope", "line 13, shot 'two': config: 'nope' given"),
        ('spectrum: "off"', "spectrum: planned-14", "spectrum: the calibration 'wan-tiny' does not fit"),
        ("kind: crossfade", "kind: wipe", "line 15, shot 'two': transition"),
        (
            "    prompt: a blue square growing on a black background\n",
            "",
            "shot 'two': prompt: missing",
        ),
        ("frames: 9", "travel: [{at: 1, prompt: b}]", "line 8, shot 'one': travel: 1 later prompt given"),
        (
            "seed: 5",
            "travel: [{at: 2, prompt: b}]",
            "line 13, shot 'two': travel.0.at: 2 given; should be less than",
        ),
        ("seed: 5", "lora: {file: none.safetensors}", "line 13, shot 'two': lora: "),
        ("seed: 5", "image: none.png", "line 13, shot 'two': image: "),
        ("seed: 5", "image: made.png", "line 13, shot 'two': image: "),  # a model of text alone
        ('"off"', "planned-14\n    lora: {file: made.safetensors}", "for revision 'sha256:"),
        ("seed: 5", "config: made.yaml", "line 9, shot 'two': model: '"),
        ("shots:", "scenes:", "scenes"),
        ("title: Shapes", "title: [", "not valid YAML"),
    ],
)
def test_what_is_wrong_is_named_with_its_line_and_shot(tmp_path: Path, old: str, new: str, said: str) -> None:
    Image.new("RGB", (64, 48)).save(tmp_path / "made.png")
    save_file(LORA, tmp_path / "made.safetensors")
    settings = (CONFIGS / "wan-tiny.yaml").read_text().replace("model: wan-tiny", "model: ./none")
    (tmp_path / "made.yaml").write_text(settings)
    path = write(tmp_path, FILM.replace(old, new, 1))
    with pytest.raises(BadRequestError) as caught:
        load_storyboard(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)


def test_shots_of_another_size_or_rate_make_no_film(tmp_path: Path) -> None:
    settings = yaml.safe_load((CONFIGS / "wan-tiny.yaml").read_text())
    for name, width in (("usual", 64), ("fast", 80)):
        own = settings | {"defaults": settings["defaults"] | {"width": width, "height": 48}}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(own | ({"fps": 12} if name == "fast" else {})))
    text = FILM.replace("width: 64\nheight: 48\n", "").replace("seed: 5", "config: ./fast.yaml")
    path = write(tmp_path, text.replace("defaults: {", "defaults: {config: ./usual.yaml, "))
    with pytest.raises(BadRequestError) as caught:
        load_storyboard(path)
    one, other = str(caught.value).splitlines()
    assert "size: 80×48, and the first shot is 64×48; give the film a width and height" in one
    assert "fps: 12, and the first shot has 8; a film needs configs with the same fps" in other


def test_every_problem_is_told_at_once(tmp_path: Path) -> None:
    wrong = FILM.replace("frames: 9", "frames: 10").replace("seconds: 4", "frames: 11")
    with pytest.raises(BadRequestError) as caught:
        load_storyboard(write(tmp_path, wrong))
    assert len(str(caught.value).splitlines()) == 2


def test_the_first_shot_fades_from_nothing(tmp_path: Path) -> None:
    text = FILM.replace("    frames: 9", "    frames: 9\n    transition: {kind: crossfade, frames: 2}")
    with pytest.raises(BadRequestError, match="line 9, shot 'one': transition: there is nothing before"):
        load_storyboard(write(tmp_path, text))


def test_a_file_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(BadRequestError, match="cannot be read: No such file"):
        load_storyboard(tmp_path / "none.yaml")


def test_an_image_of_many_shots_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    decoded = []

    def counted(path: str) -> str:
        decoded.append(path)
        return image_digest(path)

    monkeypatch.setattr("runtime.film.storyboard.image_digest", counted)
    shots = "".join(f"  - {{id: s{number}, prompt: x, frames: 5, image: a.png}}\n" for number in range(9))
    with pytest.raises(BadRequestError, match="image"):  # a model of text alone
        load_storyboard(write(tmp_path, f"title: T\nshots:\n{shots}"))
    assert decoded == [str(tmp_path / "a.png")]
