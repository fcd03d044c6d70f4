"""Contact sheet of wan-tiny's videos: a row of five frames for each, with its prompt.

python scripts/contact_sheet.py --out docs/contact-sheet.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from runtime.engine import Engine
from runtime.files.atomic import whole_file
from runtime.media.mp4 import FrameBuffer, Frames
from runtime.request.config import load_config

PROMPTS = (
    "a red circle moving left on a black background",
    "a blue square growing on a white background",
    "a yellow triangle moving up on a gray background",
    "a cyan circle moving in circles on a brown background",
    "a magenta square moving right on a black background",
    "a green triangle shrinking on a gray background",
    "a yellow circle moving down on a brown background",
    "a red square moving in circles on a white background",
)
COLUMNS, SHOWN, CAPTION_HEIGHT, GAP = 2, 5, 18, 8


def strip(engine: Engine, prompt: str, seed: int, preset: str) -> Frames:
    """Draw five frames of a video side by side, above its prompt."""
    sink = FrameBuffer()
    engine.generate(engine.config.request(prompt, spectrum=preset, seed=seed), [sink])
    frames = sink.frames
    picked = frames[np.linspace(0, len(frames) - 1, SHOWN).round().astype(int)]
    body = np.concatenate(list(picked), axis=1)
    caption = Image.new("RGB", (body.shape[1], CAPTION_HEIGHT), "white")
    ImageDraw.Draw(caption).text((2, 2), prompt, fill="black", font=ImageFont.load_default(12))
    return np.concatenate([body, np.asarray(caption)])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--preset", default="paper", help="forecasting preset")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    engine = Engine(load_config("wan-tiny"))
    strips = [strip(engine, prompt, arguments.seed, arguments.preset) for prompt in PROMPTS]
    height, width, _ = strips[0].shape
    rows = -(-len(strips) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (width + GAP) - GAP, rows * (height + GAP) - GAP), "white")
    for index, one in enumerate(strips):
        row, column = divmod(index, COLUMNS)
        sheet.paste(Image.fromarray(one), (column * (width + GAP), row * (height + GAP)))
    with whole_file(arguments.out) as temporary:
        sheet.save(temporary, format="png", optimize=True)


if __name__ == "__main__":
    main()
