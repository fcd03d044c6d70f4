"""Small random stand-ins for the repositories in the shipped configs; only their weights differ.

Weights are split into several files, as those of large models are; the sampler's settings are as an older
diffusers wrote them; the transformer is stored in float32 and loaded as the config says.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
import yaml
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file

from runtime.files.text import read_json
from runtime.request.config import available, embedded_models, load_config, shipped
from tests.conditioned import (
    CHANNELS,
    HEADS,
    write_i2v,
    write_pipeline,
    write_ti2v,
    write_two_experts,
    write_vace,
)

SHIPPED = [name for name in available(".") if name not in embedded_models()]
IN_MANY_STEPS = [name for name in SHIPPED if load_config(name).scheduler.steps is None]
OF_EACH_MODEL = list({load_config(name).model: name for name in reversed(SHIPPED)}.values())
REVISION = "0123456789abcdef0123456789abcdef01234567"
_OLD_SAMPLER = {  # what Wan2.1's repositories have: written before five of today's settings existed
    "_class_name": "UniPCMultistepScheduler", "_diffusers_version": "0.33.0.dev0", "beta_end": 0.02,
    "beta_schedule": "linear", "beta_start": 0.0001, "disable_corrector": [],
    "dynamic_thresholding_ratio": 0.995, "final_sigmas_type": "zero", "flow_shift": 3.0,
    "lower_order_final": True, "num_train_timesteps": 1000, "predict_x0": True,
    "prediction_type": "flow_prediction", "rescale_betas_zero_snr": False, "sample_max_value": 1.0,
    "solver_order": 2, "solver_p": None, "solver_type": "bh2", "steps_offset": 0, "thresholding": False,
    "timestep_spacing": "linspace", "trained_betas": None, "use_beta_sigmas": False,
    "use_exponential_sigmas": False, "use_flow_sigmas": True, "use_karras_sigmas": False,
}  # fmt: skip


def write_repositories(cache: Path) -> None:
    """Fill a Hugging Face cache (HF_HOME) with a stand-in for every shipped config."""
    for name in SHIPPED:
        repository = load_config(name).model
        folder = cache / "hub" / f"models--{repository.replace('/', '--')}"
        snapshot = folder / "snapshots" / REVISION
        if snapshot.is_dir():
            continue
        write_stand_in(repository, snapshot)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(REVISION)


def write_stand_in(repository: str, folder: Path) -> Path:
    """Write a small random model of the family of `repository`, in the layout of the published ones."""
    _write(repository, folder)
    for transformer in folder.glob("transformer*"):
        _split_weights(transformer)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(_OLD_SAMPLER))
    vae = read_json(folder / "vae" / "config.json")
    for stated in ("scale_factor_spatial", "scale_factor_temporal"):
        if not vae["is_residual"]:
            vae.pop(stated, None)
    (folder / "vae" / "config.json").write_text(json.dumps(vae))
    return folder


def _write(repository: str, folder: Path) -> None:
    if "A14B" in repository:
        write_two_experts("WanImageToVideoPipeline" if "I2V" in repository else "WanPipeline", folder)
    elif "TI2V" in repository:
        write_ti2v(folder)
    elif "I2V" in repository:
        write_i2v(folder)
    elif "VACE" in repository:
        write_vace(folder)
    else:
        _write_t2v(folder)


def write_config(name: str, folder: Path, **changes: Any) -> Path:
    """Write the shipped config `name` for its stand-in, without the size of the published transformer.

    Small stand-ins for the LoRA files that it names are written beside it.
    """
    content = yaml.safe_load(shipped(f"{name}.yaml").read_text(encoding="utf-8"))
    del content["architecture"]
    content["defaults"]["spectrum"] = load_config(name).defaults.spectrum  # PyYAML reads `off` as false
    for lora in load_config(name).lora:
        _write_lora(folder / lora.file)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content | changes), encoding="utf-8")
    return path


def _write_lora(path: Path) -> None:
    """Write a LoRA for the transformers of the stand-ins, under the names that LightX2V's have."""
    torch.manual_seed(len(path.name))
    width, target = HEADS * CHANNELS, "diffusion_model.blocks.1.self_attn.v"
    down, up = torch.randn(2, width) / width, torch.randn(width, 2) / width
    save_file({f"{target}.lora_down.weight": down, f"{target}.lora_up.weight": up}, path)


def _write_t2v(folder: Path) -> Path:
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        num_attention_heads=HEADS, attention_head_dim=CHANNELS, in_channels=16, out_channels=16, text_dim=64,
        freq_dim=32, ffn_dim=96, num_layers=2,
    )  # fmt: skip
    with torch.no_grad():
        transformer.proj_out.weight.normal_(std=0.05)
    return write_pipeline("WanPipeline", folder, transformer=transformer)


def _split_weights(folder: Path) -> None:
    """Store a transformer's weights in several files, with an index."""
    kind = getattr(diffusers, read_json(folder / "config.json")["_class_name"])
    model = kind.from_pretrained(folder, dtype=torch.float32)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    assert (folder / "diffusion_pytorch_model.safetensors.index.json").is_file()
