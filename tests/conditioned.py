"""Tiny random models with conditioning beside text, for tests of wiring, shapes and determinism."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel, WanVACETransformer3DModel
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from runtime.engine import Engine
from runtime.parallel.ranks import Ranks
from runtime.parallel.topology import Degrees
from runtime.request.config import EMBEDDED_MODELS, Config, Window
from runtime.request.sampler import SamplerConfig
from runtime.request.video_request import VideoRequest
from runtime.sampling.result import Result
from runtime.sampling.segments import denoise_segments

HEADS, CHANNELS, IMAGE_CHANNELS = 4, 16, 24
EXPERTS = ("transformer", "transformer_2")


def write_i2v(folder: Path) -> Path:
    """Write an image-to-video model: a random transformer of 2 blocks and a random image encoder."""
    torch.manual_seed(0)
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
    return write_pipeline(
        "WanImageToVideoPipeline",
        folder,
        image_processor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        image_encoder=CLIPVisionModel(settings),
        transformer=transformer,
    )


def write_two_experts(name: str, folder: Path, boundary: float = 0.875, layers: int = 2, **own: Any) -> Path:
    """Write a model of two random transformers, as Wan2.2's are, for the pipeline `name`.

    Args:
        layers: number of blocks of each.
        own: parts that replace those that it has.
    """
    channels = 36 if name == "WanImageToVideoPipeline" else 16
    experts: dict[str, WanTransformer3DModel] = {}
    for seed, expert in enumerate(EXPERTS, 1):
        torch.manual_seed(seed)
        experts[expert] = WanTransformer3DModel(
            num_attention_heads=HEADS, attention_head_dim=CHANNELS, in_channels=channels, out_channels=16,
            text_dim=64, freq_dim=32, ffn_dim=96, num_layers=layers,
        )  # fmt: skip
        with torch.no_grad():
            experts[expert].proj_out.weight.normal_(std=0.05)
    return write_pipeline(name, folder, **{**experts, "boundary_ratio": boundary, **own})


def write_ti2v(folder: Path) -> Path:
    """Write a model like TI2V-5B: a random transformer of 48 channels, and a random residual VAE."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=8, decoder_base_dim=8, z_dim=48, dim_mult=[1, 2, 2, 2], num_res_blocks=1,
        temperal_downsample=[False, True, True], is_residual=True, in_channels=12, out_channels=12,
        patch_size=2, scale_factor_temporal=4, scale_factor_spatial=16, latents_mean=[0.1] * 48,
        latents_std=[0.7] * 48,
    )  # fmt: skip
    transformer = WanTransformer3DModel(
        num_attention_heads=HEADS, attention_head_dim=CHANNELS, in_channels=48, out_channels=48, text_dim=64,
        freq_dim=32, ffn_dim=96, num_layers=2,
    )  # fmt: skip
    with torch.no_grad():
        transformer.proj_out.weight.normal_(std=0.05)
    return write_pipeline("WanPipeline", folder, vae=vae, transformer=transformer, expand_timesteps=True)


def write_vace(folder: Path) -> Path:
    """Write a VACE model with `vace_transformer`."""
    return write_pipeline("WanVACEPipeline", folder, transformer=vace_transformer())


def vace_transformer() -> WanVACETransformer3DModel:
    """Make a VACE transformer of three random blocks; control is added to the first and the last."""
    torch.manual_seed(0)
    model = WanVACETransformer3DModel(
        num_attention_heads=HEADS, attention_head_dim=CHANNELS, in_channels=16, out_channels=16, text_dim=64,
        freq_dim=32, ffn_dim=96, num_layers=3, vace_layers=[0, 2], vace_in_channels=96,
    )  # fmt: skip
    with torch.no_grad():
        model.proj_out.weight.normal_(std=0.05)
    return model.eval()


def write_pipeline(name: str, folder: Path, **own: Any) -> Path:
    """Write a pipeline of these parts and wan-tiny's text encoder, VAE and sampler."""
    whole = WanPipeline.from_pretrained(EMBEDDED_MODELS / "wan-tiny", torch_dtype=torch.float32)
    parts = {name: getattr(whole, name) for name in ("tokenizer", "text_encoder", "vae", "scheduler")}
    getattr(diffusers, name)(**{**parts, **own}).save_pretrained(folder)
    return folder


def write_image(path: Path, seed: int = 0) -> Path:
    """Write a blurry picture."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), np.uint8)
    Image.fromarray(coarse).resize((96, 64), Image.Resampling.BICUBIC).save(path)
    return path


def config_of(config: Config, folder: Path) -> Config:
    """wan-tiny's config for the model in `folder`, with small windows."""
    changes = {"model": str(folder), "architecture": None, "window": Window(frames=9, overlap=4)}
    return config.model_copy(update=changes)


def sampled(config: Config, kind: str, shift: float) -> Config:
    """A config with another sampler."""
    choice = SamplerConfig(kind=kind, shift=shift)  # type: ignore[arg-type]
    return config.model_copy(update={"scheduler": choice})


def denoised(engine: Engine, request: VideoRequest) -> torch.Tensor:
    """Denoise the request's latents."""
    plan = engine.plan(request)
    result = Result(plan)
    return denoise_segments(engine.ranks, engine.prepare(plan), result)


def denoised_on(ranks: Ranks, config: Config, request: VideoRequest, degrees: Degrees) -> torch.Tensor:
    """Denoise the request's latents as one of many ranks."""
    return denoised(Engine(config, ranks, degrees), request)
