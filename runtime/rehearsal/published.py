"""Settings of the published models that the shipped configs name, so that no download is needed.

They are those of Wan's repositories in diffusers layout; fields that are left out have the defaults of
diffusers or transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtime.models.wan.layouts.vae import MEAN_48, STD_48

_Settings = Mapping[str, Any]

_SMALL = {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960}
_LARGE = {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824}
_DENSE = {
    "num_attention_heads": 24,
    "num_layers": 30,
    "ffn_dim": 14336,
    "in_channels": 48,
    "out_channels": 48,
}
_TRANSFORMER = {
    "attention_head_dim": 128,
    "cross_attn_norm": True,
    "eps": 1e-6,
    "freq_dim": 256,
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
    "text_dim": 4096,
}
_IMAGE_LATENTS = {"in_channels": 36}
_IMAGE = {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}
_RESIDUAL_VAE = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "latents_mean": list(MEAN_48),
    "latents_std": list(STD_48),
}
_SCHEDULER = {
    "_class_name": "UniPCMultistepScheduler",
    "num_train_timesteps": 1000,
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
}
_UMT5 = {
    "model_type": "umt5",
    "d_ff": 10240,
    "d_kv": 64,
    "d_model": 4096,
    "feed_forward_proj": "gated-gelu",
    "num_heads": 64,
    "num_layers": 24,
    "vocab_size": 256384,
}
_CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 1280,
    "image_size": 224,
    "intermediate_size": 5120,
    "num_attention_heads": 16,
    "num_hidden_layers": 32,
    "patch_size": 14,
    "projection_dim": 1024,
}


def _model(
    pipeline: str,
    *parts: _Settings,
    image_encoder: bool = False,
    boundary: float | None = None,
    residual: bool = False,
) -> dict[str, _Settings]:
    """Make the files of a model, as file → content; `parts` override settings of its transformers.

    Args:
        boundary: `boundary_ratio` of a model of two transformers.
        residual: whether it has Wan2.2's own VAE, and with it a timestep for each token.
    """
    kind = "WanVACETransformer3DModel" if pipeline == "WanVACEPipeline" else "WanTransformer3DModel"
    transformer: dict[str, Any] = {"_class_name": kind, **_TRANSFORMER}
    for part in parts:
        transformer |= part
    index: dict[str, Any] = {"_class_name": pipeline, "expand_timesteps": residual}
    second: dict[str, _Settings] = {}
    if boundary is not None:
        index |= {"boundary_ratio": boundary, "transformer_2": ["diffusers", kind]}
        second = {"transformer_2/config.json": transformer}
    files: dict[str, _Settings] = {
        "model_index.json": index,
        "transformer/config.json": transformer,
        "vae/config.json": {"_class_name": "AutoencoderKLWan", **(_RESIDUAL_VAE if residual else {})},
        "text_encoder/config.json": _UMT5,
        "scheduler/scheduler_config.json": {**_SCHEDULER, "flow_shift": 5.0 if residual else 3.0},
    }
    return files | second | ({"image_encoder/config.json": _CLIP} if image_encoder else {})


def _vace(layers: range) -> _Settings:
    return {"vace_layers": list(layers), "vace_in_channels": 96}


PUBLISHED: dict[str, dict[str, _Settings]] = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": _model("WanPipeline", _SMALL),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": _model("WanPipeline", _LARGE),
    "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": _model(
        "WanImageToVideoPipeline", _LARGE, _IMAGE, image_encoder=True
    ),
    "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers": _model(
        "WanImageToVideoPipeline", _LARGE, _IMAGE, image_encoder=True
    ),
    "Wan-AI/Wan2.1-VACE-1.3B-diffusers": _model("WanVACEPipeline", _SMALL, _vace(range(0, 30, 2))),
    "Wan-AI/Wan2.1-VACE-14B-diffusers": _model("WanVACEPipeline", _LARGE, _vace(range(0, 40, 5))),
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": _model("WanPipeline", _LARGE, boundary=0.875),
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": _model("WanPipeline", _DENSE, residual=True),
    "Wan-AI/Wan2.2-I2V-A14B-Diffusers": _model(
        "WanImageToVideoPipeline", _LARGE, _IMAGE_LATENTS, boundary=0.9
    ),
}
"""Repository → file → content."""


def write_settings(repository: str, folder: Path) -> None:
    """Write the settings files of one of `PUBLISHED` into `folder`, as its repository has them."""
    for name, content in PUBLISHED[repository].items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content), encoding="utf-8")
