"""Train wan2.2-tiny, a model of two experts, from wan-tiny's weights.

    python scripts/train_wan22_tiny.py --out out/wan2.2-tiny
    python scripts/train_wan22_tiny.py --out out/wan2.2-tiny --device cuda      # minutes

Both transformers start as wan-tiny's, and each is trained further by flow matching on the noise levels that
it is for; the rest is wan-tiny's. Stages resume at their last checkpoint, and are skipped when done:

    latents        encode a fixed set of clips once
    transformer    the expert for high noise
    transformer_2  the expert for low noise
    export         a diffusers folder in float16, as Wan2.2's repositories have it

The log has the loss on held-out clips, on each expert's own noise levels, before and after. Every random
number is a function of (seed, stage, step), so a resumed run sees the same data as an uninterrupted one.
"""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path
from typing import Any, Final

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import nn
from transformers import UMT5EncoderModel
from wan_tiny_training import HELD_OUT_SEED, TRAIN_SEED, Stage, linear_second_half, train
from wan_tiny_transformer import (
    CaptionedFlow,
    ExplicitAttention,
    new_optimisers,
    new_tokenizer,
    write_pipeline,
)
from wan_tiny_vae import encode_clips

from runtime.request.config import EMBEDDED_MODELS

BOUNDARY: Final = 0.875  # as Wan2.2's text-to-video model
SHIFT: Final = 12.0  # of its sampler, likewise
NOISE: Final = {"transformer": (BOUNDARY, 1.0), "transformer_2": (0.0, BOUNDARY)}
STEPS, BATCH, CLIPS = 1200, 32, 2520
RATE: Final = 0.1  # of the learning rates from scratch

START: Final = EMBEDDED_MODELS / "wan-tiny"


def latents_of(stage: Stage, vae: AutoencoderKLWan) -> dict[str, Any]:
    """Encode clips; latents are normalised as wan-tiny's transformer knows them, by its VAE's statistics."""
    data = encode_clips(stage, vae, CLIPS)
    own = [data[name].view(1, -1, 1, 1, 1) for name in ("mean", "std")]
    known = [torch.tensor(numbers).view(1, -1, 1, 1, 1) for numbers in statistics_of(vae)]
    for name in ("train", "held_out"):
        raw = data[name]["latents"] * own[1] + own[0]
        data[name]["latents"] = (raw - known[0]) / known[1]
    return data


def statistics_of(vae: AutoencoderKLWan) -> tuple[list[float], list[float]]:
    return vae.config.latents_mean, vae.config.latents_std


def train_expert(
    stage: Stage, name: str, data: dict[str, Any], text_encoder: UMT5EncoderModel, steps: int
) -> WanTransformer3DModel:
    """Train wan-tiny's transformer on the noise levels of one expert."""
    transformer = WanTransformer3DModel.from_pretrained(START, subfolder="transformer", dtype=torch.float32)
    device = text_encoder.device
    modules, pad_bias = nn.ModuleList([transformer.to(device)]), torch.zeros((), device=device)
    if stage.result.exists():
        modules.load_state_dict(torch.load(stage.result, weights_only=True, map_location="cpu"))
        return transformer
    for block in transformer.blocks:
        block.attn1.set_processor(ExplicitAttention(pad_bias))
        block.attn2.set_processor(ExplicitAttention(pad_bias))
    tokenizer = new_tokenizer()
    flow, held_out_flow = (
        CaptionedFlow(transformer, text_encoder, tokenizer, pad_bias, seed, NOISE[name])
        for seed in (TRAIN_SEED, HELD_OUT_SEED)
    )

    @torch.no_grad()
    def held_out() -> dict[str, float]:
        losses = [held_out_flow.loss(data["held_out"], step, BATCH).item() for step in range(6)]
        return {"held_out_loss": sum(losses) / len(losses)}

    if not stage.checkpoint.exists():
        stage.record(step=0, **held_out())
    train(
        stage, modules, new_optimisers(modules, RATE), steps,
        lambda step: flow.loss(data["train"], step, BATCH), linear_second_half,
        average_decay=0.99, checkpoint_every=250, extra=held_out,
    )  # fmt: skip
    stage.save(stage.result, modules.state_dict())
    return transformer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, default=Path("out/train-wan22-tiny"), help="checkpoints and logs"
    )
    parser.add_argument("--out", type=Path, required=True, help="the diffusers folder to write")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps of each expert")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--only", choices=["latents", *NOISE], help="train this alone, beside another process; export nothing"
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)

    vae = AutoencoderKLWan.from_pretrained(START, subfolder="vae", dtype=torch.float32)
    text_encoder = UMT5EncoderModel.from_pretrained(START / "text_encoder", dtype=torch.float32)
    text_encoder.requires_grad_(False).to(arguments.device)
    data = latents_of(Stage(arguments.work, "latents"), vae.to(arguments.device))
    names = list(NOISE) if arguments.only is None else [name for name in NOISE if name == arguments.only]
    experts = {
        name: train_expert(Stage(arguments.work, name), name, data, text_encoder, arguments.steps).cpu()
        for name in names
    }
    if arguments.only is None:
        write_pipeline(
            arguments.out, vae.cpu(), text_encoder.cpu(), SHIFT, boundary_ratio=BOUNDARY, **experts
        )


if __name__ == "__main__":
    main()
