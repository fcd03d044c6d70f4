"""Accuracy of flux-tiny: whether size, colour, shape, place and background are as captions say.

    python scripts/evaluate_flux_tiny.py

Draws every held-out caption (72, none of which occurred in training) once and measures the pictures with
`flux_tiny_measure`; also measures the VAE's reconstruction of held-out stills. Prints a Markdown table, and
exits with 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from bench_flux import CALL, MODEL, load
from flux_tiny_data import HELD_OUT
from flux_tiny_measure import PROPERTIES, agrees
from flux_tiny_vae import vae_psnr

GOAL_RIGHT, GOAL_PSNR = 0.9, 25.0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=MODEL, help="a diffusers folder")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--sheet", type=Path, help="write a contact sheet of the pictures here, a PNG")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pipe = load(arguments.model)
    pictures = []
    for seed, scene in enumerate(HELD_OUT):
        generator = torch.Generator().manual_seed(seed)
        steps = {"num_inference_steps": arguments.steps, "output_type": "np"}
        pictures.append(pipe(scene.caption, generator=generator, **steps, **CALL).images[0])
    right = [agrees(picture, scene) for picture, scene in zip(pictures, HELD_OUT, strict=True)]
    if arguments.sheet:
        from PIL import Image

        rows = [np.concatenate(pictures[first : first + 12], axis=1) for first in range(0, len(pictures), 12)]
        Image.fromarray((np.concatenate(rows) * 255).astype(np.uint8)).save(arguments.sheet)
    together = sum(all(one.values()) for one in right)
    psnr = vae_psnr(pipe.vae, 48)
    print(f"| right in {len(right)} held-out captions, {arguments.steps} steps | |\n| --- | --- |")
    for name in PROPERTIES:
        print(f"| {name} | {sum(one[name] for one in right)} |")
    print(f"| all five | {together} |")
    print(
        f"| VAE on 48 held-out stills | {psnr['psnr_mean']:.1f} dB mean, {psnr['psnr_worst']:.1f} dB worst |"
    )
    return 0 if together >= GOAL_RIGHT * len(right) and psnr["psnr_mean"] >= GOAL_PSNR else 1


if __name__ == "__main__":
    sys.exit(main())
