"""A model folder with something missing or corrupt is refused before anything loads."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from runtime.engine import Engine
from runtime.errors import BadRequestError
from runtime.media.mp4 import FrameBuffer
from runtime.models import loading
from runtime.models.folder import find_model, folder_digest
from runtime.models.layouts.convert import survey
from runtime.request.config import EMBEDDED_MODELS, Architecture, Config
from runtime.request.video_request import VideoRequest

TRANSFORMER = "transformer/config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(EMBEDDED_MODELS / "wan-tiny", tmp_path / "model"))


def found(config: Config, folder: Path) -> str:
    return find_model(config.model_copy(update={"model": str(folder)})).revision


def rename(path: Path, name: str) -> None:
    path.rename(path.with_name(name))


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
        (
            lambda m: edit(m / "model_index.json", transformer_2=["diffusers", "X"]),
            "boundary_ratio does not say",
        ),
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
        (lambda m: edit(m / TRANSFORMER, in_channels=36), "expects an image"),
        (lambda m: edit(m / TRANSFORMER, in_channels=None), "config.json: in_channels: None given"),
        (lambda m: edit(m / TRANSFORMER, num_layers="8"), "num_layers: '8' given"),
        (lambda m: edit(m / TRANSFORMER, num_layers=0), "num_layers: 0 given"),
        (lambda m: edit(m / TRANSFORMER, num_layers=9), "lacks 27 weights, the first is blocks.8."),
        (lambda m: edit(m / TRANSFORMER, patch_size=2), "patch_size: 2 given; input should be a valid list"),
        (lambda m: edit(m / TRANSFORMER, rope_max_seq_len=None), "rope_max_seq_len: None given"),
        (
            lambda m: edit(m / TRANSFORMER, attention_head_dim=33),
            "attention_head_dim: 33 given; must be even",
        ),
        (
            lambda m: edit(m / TRANSFORMER, ffn_dim=700),
            "has shape [768], by config.json it should be [700]",
        ),
        (lambda m: edit(m / TRANSFORMER, text_dim=32), "gives 64 channels, its transformer takes 32"),
        (lambda m: edit(m / "vae/config.json", latents_mean=[0.0] * 15), "latents_mean has 15 numbers"),
        (lambda m: edit(m / "vae/config.json", latents_std=[0.0] * 16), "latents_std.0: 0.0 given"),
        (lambda m: edit(m / "vae/config.json", z_dim=48), "has 16 numbers where z_dim is 48"),
        (lambda m: edit(m / "vae/config.json", scale_factor_spatial="8"), "scale_factor_spatial: '8' given"),
        (lambda m: edit(m / "vae/config.json", base_dim=8), "it should be"),
        (lambda m: edit(m / "text_encoder/config.json", d_model=None), "d_model: None given"),
        (lambda m: edit(m / "text_encoder/config.json", model_type="t5"), "is not umt5"),
        (lambda m: edit(m / "text_encoder/config.json", vocab_size=7), "it should be [7, 64]"),
        (lambda m: (m / "model_index.json").write_text("[1, 2]"), "holds a list where a JSON object"),
        (lambda m: (m / "model_index.json").write_text("[" * 9**6), "not valid JSON"),
        (lambda m: (m / "model_index.json").write_text("{}"), "_class_name is missing"),
        (lambda m: (m / "vae/config.json").write_text('"x"'), "holds a str where a JSON object"),
        (lambda m: edit(m / "model_index.json", transformer_2="x"), "transformer_2: 'x' given"),
        (
            lambda m: rename(m / "transformer" / WEIGHTS, "diffusion_pytorch_model.fp16.safetensors"),
            "rename it if you want the variant 'fp16'",
        ),
        (
            lambda m: rename(m / "transformer" / WEIGHTS, "diffusion_pytorch_model.bin"),
            "pickled weights are not read, convert them to safetensors",
        ),
        (
            lambda m: (m / "transformer" / WEIGHTS).write_text(
                "version https://git-lfs.github.com/spec/v1\n"
            ),
            "git lfs pull",
        ),
    ],
)
def test_damage_is_named(config: Config, copy: Path, damage: Callable[[Path], object], said: str) -> None:
    damage(copy)
    with pytest.raises(BadRequestError, match="cannot be used") as caught:
        found(config.model_copy(update={"architecture": None}), copy)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("component", "name", "value"),
    [("transformer", "ffn_dim", 700), ("vae", "base_dim", 8), ("text_encoder", "vocab_size", 7)],
)
def test_settings_that_change_after_they_were_checked_are_checked_again(
    config: Config, copy: Path, component: str, name: str, value: int
) -> None:
    before = found(config, copy)
    settings = copy / component / "config.json"
    content = settings.read_text()
    edit(settings, **{name: value})
    with pytest.raises(BadRequestError, match="it should be"):
        found(config.model_copy(update={"architecture": None}), copy)
    settings.write_text(content)
    assert found(config, copy) == before


def test_channels_that_go_out_are_those_that_come_in_unless_said_otherwise(
    config: Config, copy: Path, small: Callable[..., VideoRequest]
) -> None:
    """diffusers' own default, and what its models write."""
    edit(copy / TRANSFORMER, out_channels=None)
    engine = Engine(config.model_copy(update={"model": str(copy)}))
    sink = FrameBuffer()
    engine.generate(small(steps=1).full, [sink])
    assert engine.sizes.channels == 16 and sink.frames.shape == (5, 48, 64, 3)  # type: ignore[attr-defined]


def shard(copy: Path) -> dict[str, str]:
    """Spread the transformer over two files; where each weight is."""
    path = copy / "transformer" / WEIGHTS
    tensors = load_file(path)
    path.unlink()
    names = sorted(tensors)
    placed = {}
    for number in range(2):
        part = {name: tensors[name] for name in names[number::2]}
        save_file(part, path.parent / f"part-{number}.safetensors", metadata={"format": "pt"})
        placed |= dict.fromkeys(part, f"part-{number}.safetensors")
    return placed


@pytest.mark.parametrize(
    ("falsify", "said"),
    [
        (lambda placed: placed, None),
        (lambda placed: [1, 2], "weight_map must be an object"),
        (lambda placed: {}, "weight_map must be an object"),
        (lambda placed: None, "weight_map must be an object"),
        (lambda placed: placed | {"more": [1]}, "weight_map must be an object"),
        (lambda placed: dict.fromkeys(placed, 1), "1 is not the name of a file beside it"),
        (lambda placed: dict.fromkeys(placed, "../vae/x"), "'../vae/x' is not the name of a file beside it"),
        (lambda placed: dict.fromkeys(placed, "part-0.safetensors"), "which does not hold it"),
        (lambda placed: placed | {"more": "part-2.safetensors"}, "part-2.safetensors is missing"),
    ],
)
def test_an_index_is_checked_against_the_files(
    config: Config, copy: Path, falsify: Callable[[dict[str, str]], object], said: str | None
) -> None:
    index = {"metadata": {}, "weight_map": falsify(shard(copy))}
    (copy / "transformer" / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    if said is None:
        assert found(config, copy)
        return
    with pytest.raises(BadRequestError, match="cannot be used") as caught:
        found(config, copy)
    assert said in str(caught.value)


def test_revisions_of_large_files_differ_wherever_they_differ_by_a_megabyte(tmp_path: Path) -> None:
    path, size = tmp_path / "a.safetensors", 80 * 2**20
    with path.open("wb") as file:
        file.truncate(size)
    seen = {folder_digest(tmp_path)}
    for place in (0, size // 3, size // 2, size - 2 * 2**20):
        with path.open("r+b") as file:
            file.seek(place)
            file.write(b"x" * 2 * 2**20)
        seen.add(folder_digest(tmp_path))
    assert len(seen) == 5


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("{tmp}/w.safetensors", "it is a single file; name the files of all components"),
        (
            "{tmp}/original",
            "and no other known layout; found: {tmp}/original/Wan2.1_VAE.pth is corrupt",
        ),
        ("{tmp}/empty", "model_index.json is missing"),
        ("{tmp}/nothing", "there is no folder '{tmp}/nothing'"),
        ("{tmp}", "it has no model_index.json (diffusers) and no other known layout"),
        ("~/nothing/there", "there is no folder '/"),
        ("C:\\models\\wan", "there is no folder '/"),
        ("", "there is no folder '/"),
        ("a\0b", "there is no folder '/"),
        ("x" * 5000, "cannot be used"),
    ],
)
def test_what_is_no_model_folder_is_told_apart(config: Config, tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "w.safetensors").write_bytes(b"x")
    (tmp_path / "original").mkdir()
    (tmp_path / "original" / "Wan2.1_VAE.pth").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadRequestError, match="model: ") as caught:
        find_model(config.model_copy(update={"model": name.format(tmp=tmp_path)}))
    assert said.format(tmp=tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_may_be_named_from_home(config: Config, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(copy.parent))
    assert find_model(config.model_copy(update={"model": "~/model"})).path == copy


def test_a_shard_that_the_index_names_must_be_there(config: Config, copy: Path) -> None:
    index = {"metadata": {}, "weight_map": {"a": WEIGHTS, "b": "other-00002.safetensors"}}
    (copy / "transformer" / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    with pytest.raises(BadRequestError, match=r"other-00002\.safetensors is missing"):
        found(config, copy)


@pytest.mark.parametrize("component", ["transformer", "vae"])
def test_weights_that_are_not_numbers_do_not_load(config: Config, copy: Path, component: str) -> None:
    path = copy / component / WEIGHTS
    tensors = load_file(path)
    name = sorted(tensors)[3]
    tensors[name].view(-1)[1] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(BadRequestError, match=f"its weights {re.escape(name)} are not finite"):
        Engine(config.model_copy(update={"model": str(copy)}))


def test_a_model_without_one_of_its_weights_does_not_load(config: Config, copy: Path) -> None:
    path = copy / "transformer" / WEIGHTS
    tensors = load_file(path)
    del tensors["proj_out.bias"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(BadRequestError, match=r"lacks 1 weights, the first is proj_out\.bias"):
        Engine(config.model_copy(update={"model": str(copy)}))


def quantised(tensors: dict[str, torch.Tensor], dtype: torch.dtype, scale: str = "") -> None:
    """Store one of the text encoder's or transformer's matrices in another dtype, with a scale beside it."""
    name = next(one for one in sorted(tensors) if tensors[one].ndim == 2)
    tensors[name] = (tensors[name].float() * 50).to(dtype)
    if scale:
        tensors[f"{name.rpartition('.')[0]}.{scale}"] = torch.tensor(0.02)


@pytest.mark.parametrize("component", [f"transformer/{WEIGHTS}", "text_encoder/model.safetensors"])
@pytest.mark.parametrize(
    ("dtype", "scale", "said"),
    [
        (torch.int8, "", "is stored as int8, a kind of quantisation that is not read"),
        (torch.int8, "weight_scale", "is stored as int8, a kind of quantisation that is not read"),
        (torch.bool, "", "is stored as bool"),
        (torch.float8_e4m3fn, "weight_scale", "is stored as float8_e4m3fn with "),
        (torch.float8_e5m2, "scale_weight", "is stored as float8_e5m2 with "),
    ],
)
def test_quantised_weights_are_not_taken_for_others(
    config: Config, copy: Path, component: str, dtype: torch.dtype, scale: str, said: str
) -> None:
    tensors = load_file(copy / component)
    quantised(tensors, dtype, scale)
    save_file(tensors, copy / component, metadata={"format": "pt"})
    for look in (lambda: found(config, copy), lambda: survey(str(copy))):
        with pytest.raises(BadRequestError, match="cannot be used") as caught:
            look()
        assert said in str(caught.value)


def test_a_model_whose_files_are_replaced_while_it_loads_is_refused(
    config: Config, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, begin = copy / "transformer" / WEIGHTS, loading.open_offload

    def replaced(*given: Any) -> Any:
        save_file({name: 2 * one for name, one in load_file(path).items()}, copy / "new")
        (copy / "new").replace(path)
        return begin(*given)

    monkeypatch.setattr(loading, "open_offload", replaced)
    with pytest.raises(BadRequestError, match="its files changed while it was loaded"):
        Engine(config.model_copy(update={"model": str(copy)}))


def test_another_architecture_than_expected_is_refused(config: Config) -> None:
    wrong = Architecture(layers=8, heads=12, head_dim=32, ffn_dim=768)
    with pytest.raises(BadRequestError, match=r"heads=6.*expects.*heads=12"):
        find_model(config.model_copy(update={"architecture": wrong}))


def test_a_model_that_is_nowhere_is_refused(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BadRequestError, match=r"neither embedded \(wan-tiny, .*\) nor a folder"):
        find_model(config.model_copy(update={"model": "nobody/nothing"}))


def test_settings_that_an_older_folder_lacks_are_its_classes_defaults(config: Config, copy: Path) -> None:
    """The repositories of Wan2.1 were saved before the VAE stated its scale factors."""
    path = copy / "vae" / "config.json"
    settings = json.loads(path.read_text())
    newer = {"scale_factor_temporal", "scale_factor_spatial"}
    path.write_text(json.dumps({name: value for name, value in settings.items() if name not in newer}))
    engine = Engine(config.model_copy(update={"model": str(copy)}))
    request = engine.config.request("a", width=64, height=48, frames=9, steps=1)
    assert engine.sizes.of(request) == (3, 6, 8)  # type: ignore[attr-defined]
    sink = FrameBuffer()
    engine.generate(request.full, [sink])
    assert sink.frames.shape == (9, 48, 64, 3)
