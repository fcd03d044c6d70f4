"""Wan2.2's two experts in other layouts: which is which, and that every weight of both arrives."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import save_file

from runtime.engine import Engine
from runtime.errors import BadRequestError
from runtime.files.text import read_json
from runtime.media.mp4 import FrameBuffer, Frames
from runtime.models.folder import ModelFolder, open_model
from runtime.models.loading import read_component
from runtime.request.config import Config, ModelFiles
from runtime.request.sampler import SamplerConfig
from tests.conditioned import write_image, write_pipeline
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
Writer = Callable[[Path, Path], Path]
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


def frames(config: Config, folder: Path, image: Path | None) -> tuple[Frames, set[str]]:
    """Frames of the model in `folder`, and the experts that made them."""
    own = config.model_copy(update={"model": str(folder), "architecture": None, "window": None})
    given = {"width": 64, "height": 48, "frames": 5, "steps": 8, "guidance": 4.0, "guidance_2": 2.5}
    given |= {} if image is None else {"image": str(image)}
    own = own.model_copy(update={"scheduler": SamplerConfig(kind="unipc", shift=8.0)})
    sink = FrameBuffer()
    result = Engine(own).generate(own.request("a red circle", **given, spectrum="off", seed=3), [sink])
    return sink.frames, {step.expert for step in result.steps}


@pytest.mark.parametrize("write", [write_experts, write_two_files])
@pytest.mark.parametrize("kind", KINDS)
def test_every_frame_is_that_of_diffusers_layout(
    config: Config, references: dict[str, Path], tmp_path: Path, kind: str, write: Writer
) -> None:
    image = write_image(tmp_path / "start.png") if kind == "i2v-a14b" else None
    other = write(references[kind], tmp_path / "other")
    (mine, experts), (theirs, _) = (frames(config, one, image) for one in (other, references[kind]))
    assert np.array_equal(mine, theirs)
    assert experts == {"transformer", "transformer_2"}


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
