"""Train wan-tiny, the embedded model, from scratch.

    python scripts/train_wan_tiny.py --out runtime/models/wan-tiny

Five stages, each resumable at its last checkpoint and skipped when done:

    vae          AutoencoderKLWan on crops of procedural clips
    latents      encode a fixed set of clips once
    transformer  WanTransformer3DModel and UMT5EncoderModel together, by flow matching on those latents
    decoder      fine-tune the VAE's decoder with the latents unchanged
    export       a diffusers folder in float16, and the numbers for its model card

Every random number is a function of (seed, stage, step), so a resumed run sees the same data as an
uninterrupted one.
"""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import nn
from wan_tiny_training import Stage
from wan_tiny_transformer import FLOW_SHIFT, train_transformer, write_pipeline
from wan_tiny_vae import encode_clips, finetune_decoder, train_vae, vae_psnr

STAGES = ("vae", "latents", "transformer", "decoder", "export")


def export(
    stage: Stage, out: Path, vae: AutoencoderKLWan, modules: nn.ModuleList, data: dict[str, Any]
) -> None:
    """Write the diffusers folder in float16 and measure the exported VAE on held-out clips."""
    transformer, text_encoder = modules
    vae.register_to_config(latents_mean=data["mean"].tolist(), latents_std=data["std"].tolist())
    write_pipeline(out, vae, text_encoder, FLOW_SHIFT, transformer=transformer)
    reloaded = AutoencoderKLWan.from_pretrained(out, subfolder="vae", torch_dtype=torch.float32)
    stage.record(**vae_psnr(reloaded, 24))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("out/train-wan-tiny"), help="checkpoints and logs")
    parser.add_argument("--out", type=Path, required=True, help="the diffusers folder to write")
    parser.add_argument("--until", choices=STAGES, default="export", help="stop after this stage")
    parser.add_argument(
        "--compile", action="store_true", help="compile the transformer's blocks (needs a C++ compiler)"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    wanted = STAGES[: STAGES.index(arguments.until) + 1]

    stages = {name: Stage(arguments.work, name) for name in STAGES}
    vae = train_vae(stages["vae"])
    if "latents" in wanted:
        data = encode_clips(stages["latents"], vae)
    if "transformer" in wanted:
        modules = train_transformer(stages["transformer"], data, arguments.compile)
    if "decoder" in wanted:
        finetune_decoder(stages["decoder"], vae)
    if "export" in wanted:
        export(stages["export"], arguments.out, vae, modules, data)


if __name__ == "__main__":
    main()
