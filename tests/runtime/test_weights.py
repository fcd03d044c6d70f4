"""A model folder with something missing or corrupt is refused before anything loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from runtime.configs import EMBEDDED_MODELS, Architecture, Config
from runtime.engine import Engine
from runtime.errors import BadRequestError
from runtime.video import FrameBuffer
from runtime.weights import find_model

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(EMBEDDED_MODELS / "wan-tiny", tmp_path / "model"))


def found(config: Config, folder: Path) -> str:
    return find_model(config.model_copy(update={"model": str(folder)})).revision


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_revision_is_of_the_content(config: Config, copy: Path) -> None:
    assert found(config, copy) == find_model(config).revision
    edit(copy / "scheduler" / "scheduler_config.json", flow_shift=5.0)
    assert found(config, copy) != find_model(config).revision


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda m: (m / "model_index.json").unlink(), "model_index.json is missing"),
        (lambda m: (m / "model_index.json").write_text("{"), "not valid JSON"),
        (lambda m: edit(m / "model_index.json", _class_name="FluxPipeline"), "it is a FluxPipeline"),
        (lambda m: edit(m / "model_index.json", transformer_2=["diffusers", "X"]), "two transformers"),
        (lambda m: (m / "transformer" / WEIGHTS).unlink(), f"transformer/{WEIGHTS} is missing"),
        (lambda m: truncate(m / "transformer" / WEIGHTS), f"transformer/{WEIGHTS} is corrupt"),
        (lambda m: truncate(m / "vae" / WEIGHTS), f"vae/{WEIGHTS} is corrupt"),
        (
            lambda m: (m / "text_encoder" / "model.safetensors").write_bytes(b"junk"),
            "model.safetensors is corrupt",
        ),
        (lambda m: (m / "vae" / "config.json").unlink(), "vae/config.json is missing"),
        (lambda m: (m / "tokenizer" / "tokenizer.json").unlink(), "neither tokenizer.json"),
        (lambda m: (m / "scheduler" / "scheduler_config.json").unlink(), "scheduler_config.json is missing"),
        (lambda m: edit(m / "transformer" / "config.json", in_channels=36), "expects an image"),
    ],
)
def test_damage_is_named(config: Config, copy: Path, damage: Callable[[Path], object], said: str) -> None:
    damage(copy)
    with pytest.raises(BadRequestError, match="cannot be used") as caught:
        found(config, copy)
    assert said in str(caught.value)


def test_a_shard_that_the_index_names_must_be_there(config: Config, copy: Path) -> None:
    index = {"metadata": {}, "weight_map": {"a": WEIGHTS, "b": "other-00002.safetensors"}}
    (copy / "transformer" / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    with pytest.raises(BadRequestError, match=r"other-00002\.safetensors is missing"):
        found(config, copy)


def test_a_model_without_one_of_its_weights_does_not_load(config: Config, copy: Path) -> None:
    path = copy / "transformer" / WEIGHTS
    tensors = load_file(path)
    del tensors["proj_out.bias"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(BadRequestError, match=r"lacks 1 weights, the first is proj_out\.bias"):
        Engine(config.model_copy(update={"model": str(copy)}))


def test_another_architecture_than_expected_is_refused(config: Config) -> None:
    wrong = Architecture(layers=8, heads=12, head_dim=32, ffn_dim=768)
    with pytest.raises(BadRequestError, match=r"heads=6.*expects.*heads=12"):
        find_model(config.model_copy(update={"architecture": wrong}))


def test_a_model_that_is_nowhere_is_refused(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BadRequestError, match=r"neither embedded \(wan-tiny\) nor a folder"):
        find_model(config.model_copy(update={"model": "nobody/nothing"}))


def test_settings_that_an_older_folder_lacks_are_its_classes_defaults(config: Config, copy: Path) -> None:
    """The repositories of Wan2.1 were saved before the VAE stated its scale factors."""
    path = copy / "vae" / "config.json"
    settings = json.loads(path.read_text())
    newer = {"scale_factor_temporal", "scale_factor_spatial"}
    path.write_text(json.dumps({name: value for name, value in settings.items() if name not in newer}))
    engine = Engine(config.model_copy(update={"model": str(copy)}))
    request = engine.config.request("a", width=64, height=48, frames=9, steps=1)
    assert engine.sizes.of(request) == (3, 6, 8)
    sink = FrameBuffer()
    engine.generate(request.full, [sink])
    assert sink.frames.shape == (9, 48, 64, 3)
