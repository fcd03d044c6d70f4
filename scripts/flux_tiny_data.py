"""Captioned stills: the world that flux-tiny is trained on, drawn as wan-tiny's clips are.

A shape of one colour and one of two sizes stands in one of five places on a background. One scene in ten is
held out: its caption never occurs in training. Every still is a pure function of (seed, index).

Tensor legend: B batch, H height, W width. Stills are `[B, 3, H, W]`, float32, in [-1, 1].
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from wan_tiny_data import BACKGROUNDS, COLOURS, SHAPES, paint

SIZE = 64

SIZES: dict[str, tuple[float, float]] = {"small": (0.12, 0.15), "large": (0.21, 0.25)}
"""Word → least and largest radius, in units of the side."""
PLACES: dict[str, tuple[float, float]] = {
    "in the middle": (0.5, 0.5),
    "on the left": (0.3, 0.5),
    "on the right": (0.7, 0.5),
    "at the top": (0.5, 0.3),
    "at the bottom": (0.5, 0.7),
}
"""Words → centre (x, y), in units of the side."""
SPREAD = 0.03  # of a centre, either way


@dataclass(frozen=True, slots=True)
class StillScene:
    """What a still shows, as named in its caption."""

    size: str
    colour: str
    shape: str
    place: str
    background: str

    @property
    def caption(self) -> str:
        return f"a {self.size} {self.colour} {self.shape} {self.place} of a {self.background} background"


SCENES = tuple(StillScene(*names) for names in itertools.product(SIZES, COLOURS, SHAPES, PLACES, BACKGROUNDS))
_ORDER = np.random.default_rng(720).permutation(len(SCENES))
HELD_OUT = tuple(SCENES[int(index)] for index in _ORDER[: len(SCENES) // 10])
TRAINED = tuple(SCENES[int(index)] for index in _ORDER[len(SCENES) // 10 :])


def render(scene: StillScene, rng: np.random.Generator, size: int = SIZE) -> np.ndarray:
    """One still, `[3, H, W]` float32 in [-1, 1]."""
    centre = np.asarray(PLACES[scene.place]) + rng.uniform(-SPREAD, SPREAD, 2)
    path = (centre[:1], centre[1:], np.full(1, rng.uniform(*SIZES[scene.size])))
    return paint(scene.colour, scene.shape, scene.background, path, rng, size)[:, 0]


def still_batch(
    seed: int, first: int, count: int, scenes: tuple[StillScene, ...] = TRAINED
) -> tuple[torch.Tensor, list[str]]:
    """Stills `first … first + count` of the stream `seed`, `[B, 3, H, W]`, and their captions.

    Every pass over `scenes` shows each of them once, shuffled.
    """
    chosen = []
    for index in range(first, first + count):
        block, offset = divmod(index, len(scenes))
        order = np.random.default_rng((seed, 1, block)).permutation(len(scenes))
        chosen.append(scenes[int(order[offset])])
    stills = [render(s, np.random.default_rng((seed, 2, first + i))) for i, s in enumerate(chosen)]
    return torch.from_numpy(np.stack(stills)), [s.caption for s in chosen]


def vocabulary() -> list[str]:
    """Every word that a caption can hold, in a fixed order."""
    return sorted({word for scene in SCENES for word in scene.caption.split()})
