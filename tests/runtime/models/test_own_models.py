"""A model of one's own needs no config: what is left out is as usual for models of its kind and size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from runtime.errors import BadRequestError
from runtime.models.configs import open_config, usual_config
from runtime.rehearsal.published import PUBLISHED, write_settings
from runtime.request.config import EMBEDDED_MODELS, Config, available, load_config
from tests.family import PIPELINE, TOY
from tests.repositories import REVISION

FINE_TUNE = "someone/finetuned"


def equal_but_for_the_model(one: Config, other: Config) -> bool:
    return one.model_copy(update={"model": other.model, "revision": other.revision}) == other


@pytest.mark.parametrize("name", [name for name in available(".") if not load_config(name).lora])
def test_models_of_each_shipped_kind_have_its_settings(name: str, tmp_path: Path) -> None:
    """The settings tell kind and size, not the resolution: of 480p and 720p it is 480p."""
    smaller = name.replace("720p", "480p")
    shipped, usual = load_config(name), load_config(smaller if smaller in available(".") else name)
    folder = EMBEDDED_MODELS / name
    if shipped.model in PUBLISHED:
        assert usual_config(shipped.model) == usual  # nothing is downloaded
        folder = tmp_path
        write_settings(shipped.model, folder)
    assert equal_but_for_the_model(usual_config(str(folder)), usual)
    assert equal_but_for_the_model(open_config(model=str(folder)), usual)


def test_another_size_has_the_settings_of_the_nearest_and_its_own_architecture(tmp_path: Path) -> None:
    write_settings("Wan-AI/Wan2.1-VACE-14B-diffusers", tmp_path)
    settings = tmp_path / "transformer" / "config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"num_attention_heads": 36}))
    config = usual_config(str(tmp_path))
    assert config.architecture is not None and config.architecture.heads == 36
    assert config.window == load_config("wan2.1-vace-14b-480p").window


def test_a_config_may_leave_out_what_is_usual(tmp_path: Path) -> None:
    path, usual = tmp_path / "mine.yaml", load_config("wan-tiny")
    (tmp_path / "own").symlink_to(EMBEDDED_MODELS / "wan-tiny")
    path.write_text("model: own\n")
    config = open_config(str(path))
    assert config.model == str(tmp_path / "own") and equal_but_for_the_model(config, usual)
    path.write_text("model: own\nfps: 9\nscheduler: {shift: 2}\ndefaults: {steps: 6, width: 64}\n")
    config = open_config(str(path))
    assert (config.fps, config.scheduler.shift, config.window) == (9, 2.0, usual.window)
    assert config.defaults == usual.defaults.model_copy(update={"steps": 6, "width": 64})
    path.write_text("model: own\ndefaults: {width: 64, height: 64, frames: 5}\n")  # which is complete
    assert open_config(str(path)).window is None


def test_a_model_replaces_that_of_a_config(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("model: wan-tiny\nrevision: v1\nfps: 9\n")
    own = str(EMBEDDED_MODELS / "wan-tiny")
    config = open_config(str(path), model=own)
    assert (config.model, config.revision, config.fps, config.defaults.width) == (own, None, 9, 96)
    config = open_config("wan2.1-t2v-1.3b-480p", model=FINE_TUNE, revision="v2")
    assert (config.model, config.revision) == (FINE_TUNE, "v2")
    assert open_config("wan2.1-t2v-1.3b-480p", revision="v2").model == "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"


def test_of_a_repository_the_settings_suffice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache without any weights: settings are all that is asked for."""
    asked = []

    def downloaded(repository: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repository, revision, allow_patterns))
        return str(snapshot)

    snapshot = tmp_path / REVISION
    snapshot.mkdir()
    write_settings("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", snapshot)
    monkeypatch.setattr("huggingface_hub.snapshot_download", downloaded)
    config = open_config(model=FINE_TUNE, revision="v2")
    assert asked == [(FINE_TUNE, "v2", ["model_index.json", "*/config.json"])]
    assert (config.model, config.revision) == (FINE_TUNE, "v2")
    assert equal_but_for_the_model(config, load_config("wan2.1-t2v-1.3b-480p"))


def test_another_family_says_what_is_usual_for_it(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": PIPELINE}))
    config = open_config(model=str(tmp_path))
    assert config.bounds == TOY.bounds and config.model == str(tmp_path)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"name": "{tmp}"},
            "config: '{tmp}' given; it is a folder, '{tmp}', and a config is a YAML file. Give",
        ),
        ({"model": "{tmp}/none"}, "model: '{tmp}/none' given; there is no folder '{tmp}/none'"),
        ({"model": "./none"}, "model: './none' given; there is no folder '{tmp}/none'"),
        ({"model": "one/two/three"}, "there is no folder '{tmp}/one/two/three'"),
        ({"model": "none"}, "nor a folder (there is no '{tmp}/none'), and it could not be downloaded"),
        ({"model": ""}, "model: '' given; must not be empty"),
        ({"model": "{tmp}"}, "model_index.json is missing"),
        ({"model": "wan-tiny", "revision": "v1"}, "revision: 'v1' given; 'wan-tiny' is on this machine"),
        ({"name": "beside.yaml"}, "there is no folder '{tmp}/weights/none'"),
        ({"name": "typo.yaml"}, "line 2: fbs: unknown field; did you mean fps?"),
        ({"name": "nameless.yaml"}, "line 1: model: missing"),
    ],
)
def test_what_is_wrong_is_said_where_it_is(
    given: dict[str, str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    (tmp_path / "beside.yaml").write_text("model: weights/none\n")
    (tmp_path / "typo.yaml").write_text("model: nobody/nothing\nfbs: 3\n")
    (tmp_path / "nameless.yaml").write_text("fps: 3\n")
    with pytest.raises(BadRequestError) as caught:
        open_config(**{name: value.format(tmp=tmp_path) for name, value in given.items()})
    assert said.format(tmp=tmp_path) in str(caught.value)
