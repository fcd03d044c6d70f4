"""What the VAE's dtype costs in quality: frames decoded in bfloat16 against those in float32.

    python scripts/bench_vae_dtype.py [--model NAME|FOLDER|REPOSITORY]

Drawn clips are encoded in float32. Their latents are decoded in each dtype, as with `dtype: {vae: …}` in a
config; PSNR is that of the frames, rounded to 8 bits as they are written, against those of float32, and
against the clips themselves, where the VAE's own loss comes first.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from diffusers import AutoencoderKLWan

from runtime.media.mp4 import Frames, to_uint8
from runtime.media.quality import psnr
from runtime.models.clips import draw_clips
from runtime.models.folder import open_model
from runtime.models.wan.colours import encode
from runtime.models.wan.vae import decode_frames

CLIPS, FRAMES, SIZE = 4, 5, 64
DTYPES = (torch.float32, torch.bfloat16)


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="wan-tiny")
    given = parser.parse_args(arguments)
    folder = open_model(given.model, None)[0] / "vae"
    clips_N3THW, latents, decoded = draw_clips(CLIPS, FRAMES, SIZE, seed=1), None, {}
    for dtype in DTYPES:
        vae = AutoencoderKLWan.from_pretrained(folder, dtype=dtype).eval()
        latents = encode(vae, clips_N3THW) if latents is None else latents
        decoded[dtype] = _frames(torch.cat(list(decode_frames(vae, latents)), dim=1))
    drawn, exact = _frames(clips_N3THW.permute(0, 2, 3, 4, 1)), decoded[torch.float32]
    print(f"{given.model}: {CLIPS} clips of {FRAMES} frames, {SIZE}×{SIZE}\n")
    print("| dtype of the VAE | against float32, PSNR in dB | against the clips, PSNR in dB |")
    print("| --- | --- | --- |")
    for dtype, frames in decoded.items():
        same = "" if dtype is torch.float32 else f"{psnr(frames, exact):.1f}"
        print(f"| {str(dtype).removeprefix('torch.')} | {same} | {psnr(frames, drawn):.2f} |")


def _frames(frames_NTHW3: torch.Tensor) -> Frames:
    """Frames of all clips, one after another, in 8 bits."""
    return to_uint8(frames_NTHW3.flatten(0, 1))


if __name__ == "__main__":
    main()
