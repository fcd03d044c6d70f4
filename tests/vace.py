"""A tiny VACE model with random weights: for wiring, shapes and determinism, not for looks."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import WanPipeline, WanVACEPipeline, WanVACETransformer3DModel

from runtime.configs import EMBEDDED_MODELS, Config, Window


def vace_transformer() -> WanVACETransformer3DModel:
    """Three random blocks; the control path adds to the first and the last."""
    torch.manual_seed(0)
    model = WanVACETransformer3DModel(
        num_attention_heads=4, attention_head_dim=16, in_channels=16, out_channels=16, text_dim=64,
        freq_dim=32, ffn_dim=96, num_layers=3, vace_layers=[0, 2], vace_in_channels=96,
    )  # fmt: skip
    with torch.no_grad():
        model.proj_out.weight.normal_(std=0.05)
    return model.eval()


def write_vace(folder: Path) -> Path:
    """wan-tiny's text encoder and VAE around it."""
    whole = WanPipeline.from_pretrained(EMBEDDED_MODELS / "wan-tiny", torch_dtype=torch.float32)
    WanVACEPipeline(
        tokenizer=whole.tokenizer,
        text_encoder=whole.text_encoder,
        vae=whole.vae,
        scheduler=whole.scheduler,
        transformer=vace_transformer(),
    ).save_pretrained(folder)
    return folder


def vace_config(config: Config, folder: Path) -> Config:
    """wan-tiny's config for the model in `folder`, with small windows."""
    changes = {"model": str(folder), "architecture": None, "window": Window(frames=9, overlap=4)}
    return config.model_copy(update=changes)
