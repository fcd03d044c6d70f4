"""flux-tiny's VAE: its initial weights, its training, and its latents.

Stills are `[B, 3, H, W]`: B batch, H height, W width; float32 in [-1, 1].
"""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers import AutoencoderKL
from flux_tiny_data import HELD_OUT, TRAINED, still_batch
from torch import nn
from wan_tiny_training import HELD_OUT_SEED, TRAIN_SEED, Stage, cosine, generator, train
from wan_tiny_vae import picture_loss, start_as_identity

VAE_STEPS, BATCH = 4000, 8
LATENT_STILLS, HELD_OUT_STILLS = 8 * len(TRAINED), len(HELD_OUT)


def new_vae() -> AutoencoderKL:
    """Make an untrained VAE of a quarter of the side and 8 channels, whose convolutions are the identity."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=8,
        sample_size=64,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )
    for module in vae.modules():
        if isinstance(module, nn.Conv2d):
            start_as_identity(module)
            module.to(memory_format=torch.channels_last)
    return vae


@torch.no_grad()
def vae_psnr(vae: AutoencoderKL, stills: int) -> dict[str, float]:
    """PSNR in dB of `vae.decode(vae.encode(still))` over held-out stills."""
    pixels, _ = still_batch(HELD_OUT_SEED, 0, stills, HELD_OUT)
    output = vae.decode(vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
    errors = (output - pixels).square().mean(dim=(1, 2, 3)).tolist()
    values = [10 * math.log10(4.0 / error) for error in errors]
    return {"psnr_mean": sum(values) / stills, "psnr_worst": min(values)}


def train_vae(stage: Stage) -> AutoencoderKL:
    vae = new_vae()
    if stage.result.exists():
        vae.load_state_dict(torch.load(stage.result, weights_only=True))
        return vae

    def loss_at(step: int) -> torch.Tensor:
        pixels, _ = still_batch(TRAIN_SEED, 100_000 + step * BATCH, BATCH)
        posterior = vae.encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator(TRAIN_SEED, 12, step))
        output = vae.decode(posterior.mean + posterior.std * noise).sample
        return picture_loss(output, pixels) + 1e-4 * posterior.kl().mean() / posterior.mean[0].numel()

    optimiser = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0.01, betas=(0.9, 0.98))
    train(
        stage, nn.ModuleList([vae]), [optimiser], VAE_STEPS, loss_at, cosine,
        average_decay=0.99, extra=lambda: vae_psnr(vae, 16),
    )  # fmt: skip
    stage.save(stage.result, vae.state_dict())
    return vae


@torch.no_grad()
def encode_stills(stage: Stage, vae: AutoencoderKL) -> dict[str, Any]:
    """Encode the training stills and the held-out ones; latents as the transformer sees them.

    FLUX has one shift and one factor for all channels: (latent − shift) · factor.
    """
    if stage.result.exists():
        return torch.load(stage.result, weights_only=True)
    sets: dict[str, Any] = {}
    for name, seed, count, scenes in (
        ("train", TRAIN_SEED, LATENT_STILLS, TRAINED),
        ("held_out", HELD_OUT_SEED, HELD_OUT_STILLS, HELD_OUT),
    ):
        latents, captions = [], []
        for first in range(0, count, 24):
            pixels, texts = still_batch(seed, first, min(24, count - first), scenes)
            latents.append(vae.encode(pixels).latent_dist.mode())
            captions += texts
        sets[name] = {"latents": torch.cat(latents), "captions": captions}
        stage.record(set=name, stills=count)
    shift, factor = sets["train"]["latents"].mean(), 1.0 / sets["train"]["latents"].std()
    for entry in sets.values():
        entry["latents"] = (entry["latents"] - shift) * factor
    result = {**sets, "shift": shift, "factor": factor}
    stage.save(stage.result, result)
    return result
