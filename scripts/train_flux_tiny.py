"""Train flux-tiny, a text-to-image model of FLUX.1's architecture, from scratch.

    python scripts/train_flux_tiny.py --out tests/models/flux-tiny

Five stages, each resumable at its last checkpoint and skipped when done:

    vae          AutoencoderKL on procedural stills
    latents      encode a fixed set of stills once
    transformer  FluxTransformer2DModel, T5EncoderModel and CLIPTextModel together, by flow matching
    distil       guidance as an input, learned from the model's own guidance, as FLUX.1-dev's was
    export       a diffusers folder in float16, and the VAE's PSNR

Every random number is a function of (seed, stage, step), so a resumed run sees the same data as an
uninterrupted one.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from flux_tiny_transformer import distil, pipeline_of, train_transformer
from flux_tiny_vae import encode_stills, train_vae, vae_psnr
from wan_tiny_training import Stage
from wan_tiny_transformer import save_half

STAGES = ("vae", "latents", "transformer", "distil", "export")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("out/train-flux-tiny"), help="checkpoints and logs")
    parser.add_argument("--out", type=Path, required=True, help="the diffusers folder to write")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)

    stages = {name: Stage(arguments.work, name) for name in STAGES}
    vae = train_vae(stages["vae"])
    data = encode_stills(stages["latents"], vae)
    modules = train_transformer(stages["transformer"], data)
    distil(stages["distil"], data, modules)
    vae.register_to_config(shift_factor=float(data["shift"]), scaling_factor=float(data["factor"]))
    save_half(pipeline_of(vae, modules), arguments.out)
    reloaded = AutoencoderKL.from_pretrained(arguments.out, subfolder="vae", torch_dtype=torch.float32)
    stages["export"].record(**vae_psnr(reloaded, 48))


if __name__ == "__main__":
    main()
