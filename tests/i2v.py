"""A tiny image-to-video model with random weights: for wiring, shapes and determinism, not for looks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from runtime.configs import EMBEDDED_MODELS, Config, Window

HEADS, CHANNELS, IMAGE_CHANNELS = 4, 16, 24


def write_model(folder: Path) -> Path:
    """wan-tiny's text encoder and VAE around a random I2V transformer of 2 blocks."""
    torch.manual_seed(0)
    whole = WanPipeline.from_pretrained(EMBEDDED_MODELS / "wan-tiny", torch_dtype=torch.float32)
    transformer = WanTransformer3DModel(
        num_attention_heads=HEADS, attention_head_dim=CHANNELS, in_channels=36, out_channels=16, text_dim=64,
        freq_dim=32, ffn_dim=96, num_layers=2, image_dim=IMAGE_CHANNELS, added_kv_proj_dim=HEADS * CHANNELS,
    )  # fmt: skip
    with torch.no_grad():
        transformer.proj_out.weight.normal_(std=0.05)
    settings = CLIPVisionConfig(
        hidden_size=IMAGE_CHANNELS, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        image_size=32, patch_size=8,
    )  # fmt: skip
    WanImageToVideoPipeline(
        tokenizer=whole.tokenizer,
        text_encoder=whole.text_encoder,
        vae=whole.vae,
        scheduler=whole.scheduler,
        image_processor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        image_encoder=CLIPVisionModel(settings),
        transformer=transformer,
    ).save_pretrained(folder)
    return folder


def write_image(path: Path, seed: int = 0) -> Path:
    """A blurry picture."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), np.uint8)
    Image.fromarray(coarse).resize((96, 64), Image.Resampling.BICUBIC).save(path)
    return path


def i2v_config(config: Config, folder: Path) -> Config:
    """wan-tiny's config for the model in `folder`, with small windows."""
    changes = {"model": str(folder), "architecture": None, "window": Window(frames=9, overlap=4)}
    return config.model_copy(update=changes)
