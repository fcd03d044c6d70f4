"""Accuracy of wan-tiny: whether colour, background and motion of its videos are as the captions say.

    python scripts/evaluate_wan_tiny.py

Makes 48 fixed prompts × seeds with the engine and measures them with `wan_tiny_measure`; also measures the
VAE's reconstruction of held-out clips. Prints a Markdown table, and exits with 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from wan_tiny_data import SCENES, Scene
from wan_tiny_measure import Finding, measure
from wan_tiny_vae import vae_psnr

from runtime.engine import Engine
from runtime.media.mp4 import FrameBuffer, Frames
from runtime.models.folder import find_model
from runtime.request.config import load_config

PROMPTS = 48
GOAL_RIGHT, GOAL_PSNR = 0.9, 27.0
PROPERTIES = ("colour", "background", "motion")


def fixed_scenes() -> list[Scene]:
    """Choose 48 of the 504 scenes, always the same."""
    chosen = np.random.default_rng(48).permutation(len(SCENES))[:PROMPTS]
    return [SCENES[int(index)] for index in chosen]


def generate(engine: Engine, scene: Scene, seed: int, preset: str) -> Frames:
    """Make one video of the scene's caption, `[T, H, W, 3]`."""
    sink = FrameBuffer()
    engine.generate(engine.config.request(scene.caption, spectrum=preset, seed=seed), [sink])
    return sink.frames


def find(arguments: tuple[str, str, Sequence[tuple[int, Scene]]]) -> list[tuple[int, Scene, Finding, Frames]]:
    """Generate and measure one process's share, on one thread."""
    model, preset, share = arguments
    torch.set_num_threads(1)
    engine = Engine(load_config("wan-tiny").model_copy(update={"model": model}))
    found = []
    for seed, scene in share:
        frames = generate(engine, scene, seed, preset)
        found.append((seed, scene, measure(frames.astype(np.float32) / 255), frames))
        print(f"{seed}: {scene.caption}: {found[-1][2]}", file=sys.stderr, flush=True)
    return found


def load_vae(model: str) -> AutoencoderKLWan:
    folder = find_model(load_config("wan-tiny").model_copy(update={"model": model})).path
    return AutoencoderKLWan.from_pretrained(folder / "vae", dtype=torch.float32)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="wan-tiny", help="an embedded model's name, or a folder")
    parser.add_argument("--preset", default="off", help="forecasting preset")
    parser.add_argument("--clips", type=int, default=24, help="held-out clips for the VAE")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--sheet", type=Path, help="write a contact sheet of the videos here, a PNG")
    arguments = parser.parse_args()

    tasks = list(enumerate(fixed_scenes()))
    shares = [
        (arguments.model, arguments.preset, tasks[first :: arguments.processes])
        for first in range(arguments.processes)
    ]
    with multiprocessing.get_context("spawn").Pool(arguments.processes) as pool:
        found = [result for share in pool.map(find, shares) for result in share]
    right = [finding.agrees(scene) for _, scene, finding, _ in found]
    psnr = vae_psnr(load_vae(arguments.model), arguments.clips)
    if arguments.sheet:
        contact_sheet(sorted(found, key=lambda result: result[0]), arguments.sheet)

    together = sum(all(one.values()) for one in right)
    print(f"| right in {PROMPTS} prompts × seeds, preset {arguments.preset} | |\n| --- | --- |")
    for name in PROPERTIES:
        print(f"| {name} | {sum(one[name] for one in right)} |")
    print(f"| all three | {together} |")
    reconstruction = f"{psnr['psnr_mean']:.1f} dB mean, {psnr['psnr_worst']:.1f} dB worst"
    print(f"| VAE on {arguments.clips} held-out clips | {reconstruction} |")
    return 0 if together >= GOAL_RIGHT * PROMPTS and psnr["psnr_mean"] >= GOAL_PSNR else 1


def contact_sheet(found: Sequence[tuple[int, Scene, Finding, Frames]], path: Path) -> None:
    """Draw five frames of each video in a row, two videos side by side; a red bar marks a wrong one."""
    from PIL import Image

    rows = []
    for _, scene, finding, frames in found:
        row = np.concatenate(list(frames[:: (len(frames) - 1) // 4]), axis=1)
        wrong = not all(finding.agrees(scene).values())
        bar = np.full((row.shape[0], 4, 3), (255, 0, 0) if wrong else (255, 255, 255), np.uint8)
        rows.append(np.concatenate([row, bar], axis=1))
    pairs = [np.concatenate(rows[i : i + 2], axis=1) for i in range(0, len(rows) - 1, 2)]
    Image.fromarray(np.concatenate(pairs)).save(path)


if __name__ == "__main__":
    sys.exit(main())
