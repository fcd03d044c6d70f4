"""wan-tiny's VAE: its initial weights, its training, and its latents.

Clips and crops are `[B, 3, F, H, W]`: B batch, F frames, H height, W width; float32 in [-1, 1].
"""

from __future__ import annotations

import math
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from multiprocessing import get_context
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import nn
from wan_tiny_data import clip_batch
from wan_tiny_training import HELD_OUT_SEED, TRAIN_SEED, Stage, cosine, generator, train

from runtime.models.wan.vae import decode_chunks

LATENT_CLIPS, HELD_OUT_CLIPS = 2520, 96  # five passes over the 504 scenes
IMAGE_STEPS, CLIP_STEPS, DECODER_STEPS = 300, 1100, 240


def new_vae() -> AutoencoderKLWan:
    """Make an untrained VAE whose convolutions are the identity; usual weights would learn only the mean."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=16,
        z_dim=16,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 16,
        latents_std=[1.0] * 16,
    )
    for module in vae.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            start_as_identity(module)
            layout = torch.channels_last_3d if isinstance(module, nn.Conv3d) else torch.channels_last
            module.to(memory_format=layout)  # oneDNN's convolutions are faster on it
    return vae


@torch.no_grad()
def start_as_identity(conv: nn.Conv2d | nn.Conv3d) -> None:
    """Output channel o copies input channel o mod inputs (latest frame, central pixel), plus small noise."""
    outputs, inputs, *kernel = conv.weight.shape
    conv.weight.mul_(0.2)
    centre = [k // 2 for k in kernel]
    if isinstance(conv, nn.Conv3d):
        centre[0] = kernel[0] - 1  # causal: the last tap is the current frame
    for output in range(outputs):
        conv.weight[(output, output % inputs, *centre)] += 1.0
    if conv.bias is not None:
        conv.bias.zero_()


def reconstruct(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Decode without the clamp of `vae.decode`, whose gradient vanishes on dark and bright backgrounds."""
    return torch.cat(list(decode_chunks(vae, latents)), dim=2)


def picture_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L1 + 0.5 L2 + 0.25 L1 of the spatial gradients."""
    output = output.float()
    gradients = sum(F.l1_loss(output.diff(dim=dim), target.diff(dim=dim)) for dim in (-1, -2))
    return F.l1_loss(output, target) + 0.5 * F.mse_loss(output, target) + 0.25 * gradients


def crops(step: int, *, clips: int, frames: int, side: int, per_clip: int) -> torch.Tensor:
    """Random crops of fresh clips: `[clips · per_clip, 3, frames, side, side]`."""
    pixels, _ = clip_batch(TRAIN_SEED, 100_000 + step * clips, clips)
    g = generator(TRAIN_SEED, 11, step)
    taken = []
    for clip in pixels:
        for _ in range(per_clip):
            t, y, x = (
                int(torch.randint(0, limit + 1, (), generator=g))
                for limit in (clip.shape[1] - frames, clip.shape[2] - side, clip.shape[3] - side)
            )
            taken.append(clip[:, t : t + frames, y : y + side, x : x + side])
    return torch.stack(taken)


def vae_batch(step: int) -> torch.Tensor:
    if step < IMAGE_STEPS:
        return crops(step, clips=4, frames=1, side=48, per_clip=4)
    if step % 8 == 0:
        return clip_batch(TRAIN_SEED, 100_000 + step * 4, 1)[0]
    return crops(step, clips=2, frames=9, side=48, per_clip=2)


@torch.no_grad()
def vae_psnr(vae: AutoencoderKLWan, clips: int) -> dict[str, float]:
    """PSNR in dB of `vae.decode(vae.encode(clip))` over held-out clips."""
    values = []
    for index in range(clips):
        pixels, _ = clip_batch(HELD_OUT_SEED, index, 1)
        output = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
        values.append(10 * math.log10(4.0 / F.mse_loss(output, pixels).item()))
    return {"psnr_mean": sum(values) / clips, "psnr_worst": min(values)}


def train_vae(stage: Stage) -> AutoencoderKLWan:
    vae = new_vae()
    modules = nn.ModuleList([vae])
    if stage.result.exists():
        vae.load_state_dict(torch.load(stage.result, weights_only=True))
        return vae

    def loss_at(step: int) -> torch.Tensor:
        pixels = vae_batch(step)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(pixels).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator(TRAIN_SEED, 12, step))
            output = reconstruct(vae, posterior.mean + posterior.std * noise)
        return picture_loss(output, pixels) + 1e-4 * posterior.kl().mean() / posterior.mean[0].numel()

    optimiser = torch.optim.AdamW(vae.parameters(), lr=1e-3, weight_decay=0.01, betas=(0.9, 0.98))
    train(
        stage, modules, [optimiser], IMAGE_STEPS + CLIP_STEPS, loss_at, cosine,
        average_decay=0.99, extra=lambda: vae_psnr(vae, 4),
    )  # fmt: skip
    stage.save(stage.result, vae.state_dict())
    return vae


def finetune_decoder(stage: Stage, vae: AutoencoderKLWan) -> None:
    """Train only the decoder, so that the latents that the transformer has learnt keep their meaning."""
    modules = nn.ModuleList([vae.post_quant_conv, vae.decoder])
    if stage.result.exists():
        vae.load_state_dict(torch.load(stage.result, weights_only=True))
        return

    def loss_at(step: int) -> torch.Tensor:
        pixels = vae_batch(IMAGE_STEPS + 50_000 + step)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                latents = vae.encode(pixels).latent_dist.mode()
            latents = latents + 0.02 * torch.randn(latents.shape, generator=generator(TRAIN_SEED, 13, step))
            output = reconstruct(vae, latents)
        return picture_loss(output, pixels)

    optimiser = torch.optim.AdamW(modules.parameters(), lr=5e-4, weight_decay=0.01, betas=(0.9, 0.98))
    train(
        stage, modules, [optimiser], DECODER_STEPS, loss_at, cosine,
        average_decay=0.99, extra=lambda: vae_psnr(vae, 4),
    )  # fmt: skip
    stage.save(stage.result, vae.state_dict())


@torch.no_grad()
def encode_clips(stage: Stage, vae: AutoencoderKLWan, clips: int = LATENT_CLIPS) -> dict[str, Any]:
    """Encode `clips` training clips and the held-out ones on the VAE's device.

    Latents are on the CPU, normalised per channel, with their statistics.
    """
    if stage.result.exists():
        return torch.load(stage.result, weights_only=True)
    sets: dict[str, Any] = {}
    for name, seed, count in (
        ("train", TRAIN_SEED, clips),
        ("held_out", HELD_OUT_SEED, HELD_OUT_CLIPS),
    ):
        latents, captions, firsts = [], [], range(0, count, 8)
        with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
            batches = pool.map(clip_batch, repeat(seed), firsts, [min(8, count - one) for one in firsts])
            for pixels, texts in batches:
                with torch.autocast(vae.device.type, torch.bfloat16):
                    latents.append(vae.encode(pixels.to(vae.device)).latent_dist.mode().float().cpu())
                captions += texts
        sets[name] = {"latents": torch.cat(latents), "captions": captions}
        stage.record(set=name, clips=count)
    mean = sets["train"]["latents"].mean(dim=(0, 2, 3, 4))
    std = sets["train"]["latents"].std(dim=(0, 2, 3, 4))
    for entry in sets.values():
        entry["latents"] = (entry["latents"] - mean.view(1, -1, 1, 1, 1)) / std.view(1, -1, 1, 1, 1)
    result = {**sets, "mean": mean, "std": std}
    stage.save(stage.result, result)
    return result
