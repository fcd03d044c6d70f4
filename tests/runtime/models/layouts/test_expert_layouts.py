"""Wan2.2's two experts in other layouts: which is which, and that every weight of both arrives."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import save_file

from runtime.errors import BadRequestError
from runtime.files.text import read_json
from runtime.models.folder import ModelFolder, open_model
from runtime.models.loading import read_component
from runtime.request.config import ModelFiles
from tests.conditioned import write_pipeline
from tests.originals import (
    mapping,
    original_transformer,
    random_transformer,
    random_vae,
    state_of,
    write_experts,
    write_single_files,
)

pytestmark = pytest.mark.usefixtures("cached")
KINDS = {"t2v": ("WanPipeline", 0.875), "i2v-a14b": ("WanImageToVideoPipeline", 0.9)}


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models of two experts in diffusers layout; that from an image has no image encoder."""
    made = {}
    for kind, (pipeline, boundary) in KINDS.items():
        torch.manual_seed(1)
        parts = {name: random_transformer(kind) for name in ("transformer", "transformer_2")}
        none = {} if kind == "t2v" else {"image_encoder": None, "image_processor": None}
        folder = tmp_path_factory.mktemp("experts") / kind
        made[kind] = write_pipeline(
            pipeline, folder, **parts, **none, vae=random_vae(), boundary_ratio=boundary
        )
    return made


def write_two_files(reference: Path, folder: Path) -> Path:
    """Write both experts as single files, as ComfyUI has them."""
    write_single_files(reference, folder)
    (folder / "diffusion_models" / "wan2.1_t2v_1.3B_bf16.safetensors").unlink()
    for name, noise in (("transformer", "high"), ("transformer_2", "low")):
        file = folder / "diffusion_models" / f"wan2.2_t2v_{noise}_noise_14B.safetensors"
        save_file(original_transformer(state_of(reference / name)), file)
    return folder


@pytest.mark.parametrize("write", [write_experts, write_two_files])
@pytest.mark.parametrize("kind", KINDS)
def test_both_arrive_each_in_its_place(
    references: dict[str, Path], tmp_path: Path, kind: str, write: object
) -> None:
    assert callable(write)
    folder, _ = open_model(str(write(references[kind], tmp_path / "other")), None)
    index = read_json(folder / "model_index.json")
    assert (index["_class_name"], index["boundary_ratio"]) == KINDS[kind]
    assert not (folder / "image_encoder").exists()
    found = ModelFolder("experts", folder, "", index["_class_name"])
    for name in ("transformer", "transformer_2"):
        mine = read_component(WanTransformer3DModel, found, name, torch.float32).state_dict()
        theirs = state_of(references[kind] / name)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    vae = read_component(AutoencoderKLWan, found, "vae", torch.float32).state_dict()
    assert all(torch.equal(vae[key], one) for key, one in state_of(references[kind] / "vae").items())


def test_files_that_are_named_may_have_any_names(references: dict[str, Path], tmp_path: Path) -> None:
    folder = write_two_files(references["t2v"], tmp_path / "other")
    for noise, name in (("high", "a"), ("low", "b")):
        file = next((folder / "diffusion_models").glob(f"*{noise}*"))
        file.rename(file.with_name(f"{name}.safetensors"))
    with pytest.raises(
        BadRequestError, match=r"two transformers: .*a\.safetensors, .*b\.safetensors; their names"
    ):
        open_model(str(folder), None)
    places = {f"transformer{end}": str(folder / "diffusion_models" / name) for end, name in FILES.items()}
    view, _ = open_model(ModelFiles(**(mapping(folder) | places)), None)
    found = ModelFolder("experts", view, "", "WanPipeline")
    for name in ("transformer", "transformer_2"):
        mine = read_component(WanTransformer3DModel, found, name, torch.float32).state_dict()
        assert all(torch.equal(mine[key], one) for key, one in state_of(references["t2v"] / name).items())


FILES = {"": "a.safetensors", "_2": "b.safetensors"}


def test_a_part_that_is_missing_of_one_expert_is_told(references: dict[str, Path], tmp_path: Path) -> None:
    folder = write_experts(references["t2v"], tmp_path / "other")
    shutil.copytree(folder, tmp_path / "whole")
    next((folder / "low_noise_model").glob("*-00002-of-*")).unlink()
    with pytest.raises(BadRequestError, match=r"low_noise_model/.*-00002-of-00002.safetensors is missing"):
        open_model(str(folder), None)
    assert open_model(str(tmp_path / "whole"), None)
