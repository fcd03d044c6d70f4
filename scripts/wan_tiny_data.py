"""Procedural captioned clips: the world that wan-tiny is trained on.

One shaded, rimmed, anti-aliased shape moves over a background with a soft gradient and a fine texture. Every
clip is a pure function of (seed, index), so training data never has to be stored and a resumed run sees the
same clips.

Tensor legend: B batch, F frames, H height, W width. Clips are `[B, 3, F, H, W]`, float32, in [-1, 1].
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch

FRAMES = 17
SIZE = 96

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.12, 0.12),
    "green": (0.12, 0.75, 0.18),
    "blue": (0.15, 0.25, 0.95),
    "yellow": (0.95, 0.88, 0.10),
    "cyan": (0.10, 0.85, 0.90),
    "magenta": (0.90, 0.15, 0.85),
}
BACKGROUNDS: dict[str, tuple[float, float, float]] = {
    "black": (0.06, 0.06, 0.06),
    "gray": (0.48, 0.48, 0.48),
    "white": (0.93, 0.93, 0.93),
    "brown": (0.42, 0.26, 0.13),
}
SHAPES = ("circle", "square", "triangle")
MOTIONS: dict[str, str] = {
    "left": "moving left",
    "right": "moving right",
    "up": "moving up",
    "down": "moving down",
    "circling": "moving in circles",
    "growing": "growing",
    "shrinking": "shrinking",
}
TEXTURE_PERIOD = 16  # pixels: one transformer token


@dataclass(frozen=True, slots=True)
class Scene:
    """What a clip shows, as named in its caption."""

    colour: str
    shape: str
    motion: str
    background: str

    @property
    def caption(self) -> str:
        return f"a {self.colour} {self.shape} {MOTIONS[self.motion]} on a {self.background} background"


SCENES = tuple(Scene(*names) for names in itertools.product(COLOURS, SHAPES, MOTIONS, BACKGROUNDS))


def scene_for(seed: int, index: int) -> Scene:
    """The scene of clip `index`: every block of `len(SCENES)` clips shows each scene once, shuffled."""
    block, offset = divmod(index, len(SCENES))
    order = np.random.default_rng((seed, 1, block)).permutation(len(SCENES))
    return SCENES[int(order[offset])]


def _path(motion: str, rng: np.random.Generator, frames: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centre (x, y) and radius per frame, in units of the frame's side."""
    t = np.linspace(0.0, 1.0, frames)
    radius = np.full(frames, rng.uniform(0.13, 0.18))
    x = np.full(frames, rng.uniform(0.35, 0.65))
    y = np.full(frames, rng.uniform(0.35, 0.65))
    if motion in ("left", "right", "up", "down"):
        start, end = rng.uniform(0.22, 0.30), rng.uniform(0.70, 0.78)
        track = start + (end - start) * t
        track = track if motion in ("right", "down") else track[::-1]
        x, y = (track, y) if motion in ("left", "right") else (x, track)
    elif motion == "circling":
        angle = 2 * math.pi * (t + rng.uniform())
        reach = rng.uniform(0.20, 0.26)
        x, y = 0.5 + reach * np.cos(angle), 0.5 + reach * np.sin(angle)
    else:
        small, large = rng.uniform(0.07, 0.10), rng.uniform(0.24, 0.30)
        radius = small + (large - small) * (t if motion == "growing" else t[::-1])
    return x, y, radius


def _signed_distance(shape: str, dx: np.ndarray, dy: np.ndarray, r: np.ndarray) -> np.ndarray:
    """Signed distance to the outline, negative inside; all arguments in pixels."""
    if shape == "circle":
        return np.hypot(dx, dy) - r
    if shape == "square":
        return np.maximum(np.abs(dx), np.abs(dy)) - 0.9 * r
    side = 0.5 * math.sqrt(3.0)  # equilateral triangle pointing up: the outermost of three half-planes
    half_planes = (dy - 0.6 * r, side * dx - 0.5 * dy - 0.6 * r, -side * dx - 0.5 * dy - 0.6 * r)
    return np.maximum.reduce(half_planes)


def render(scene: Scene, rng: np.random.Generator, frames: int = FRAMES, size: int = SIZE) -> np.ndarray:
    """One clip, `[3, F, H, W]` float32 in [-1, 1]."""
    path = _path(scene.motion, rng, frames)
    return paint(scene.colour, scene.shape, scene.background, path, rng, size)


def paint(
    colour: str,
    shape: str,
    background: str,
    path: tuple[np.ndarray, np.ndarray, np.ndarray],
    rng: np.random.Generator,
    size: int,
) -> np.ndarray:
    """Paint a shape along a path: centre (x, y) and radius in every frame; `[3, F, H, W]` as above."""
    yy, xx = np.mgrid[0:size, 0:size].astype(np.float32) + 0.5
    x, y, radius = (v.astype(np.float32)[:, None, None] * size for v in path)

    angle = rng.uniform(0, 2 * math.pi)
    gradient = (math.cos(angle) * (xx / size - 0.5) + math.sin(angle) * (yy / size - 0.5)) * rng.uniform(
        0.05, 0.2
    )
    waves = 2 * math.pi / TEXTURE_PERIOD
    texture = 0.035 * np.sin(waves * xx) * np.sin(waves * yy)
    ground = np.asarray(BACKGROUNDS[background], np.float32)[:, None, None] + gradient + texture

    dx, dy = xx - x, yy - y
    distance = _signed_distance(shape, dx, dy, radius)
    light = 1.0 - 0.22 * (dx + dy) / np.maximum(radius, 1.0)  # lit from the upper left
    rim = 1.0 - 0.45 * np.clip(1.0 - np.abs(distance + 1.5) / 1.5, 0.0, 1.0)
    alpha = np.clip(0.5 - distance, 0.0, 1.0)
    fill = np.asarray(COLOURS[colour], np.float32)[:, None, None, None] * (light * rim)
    clip = ground[:, None] * (1.0 - alpha) + fill * alpha
    return (np.clip(clip, 0.0, 1.0) * 2.0 - 1.0).astype(np.float32)


def clip_batch(seed: int, first: int, count: int) -> tuple[torch.Tensor, list[str]]:
    """Clips `first … first + count` of the stream `seed`, `[B, 3, F, H, W]`, and their captions."""
    scenes = [scene_for(seed, i) for i in range(first, first + count)]
    clips = [render(s, np.random.default_rng((seed, 2, first + i))) for i, s in enumerate(scenes)]
    return torch.from_numpy(np.stack(clips)), [s.caption for s in scenes]


def vocabulary() -> list[str]:
    """Every word that a caption can hold, in a fixed order."""
    words = {word for scene in SCENES for word in scene.caption.split()}
    return sorted(words)
