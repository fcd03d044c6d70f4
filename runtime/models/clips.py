"""Clips of simple scenes, drawn from a seed: something for a VAE to encode where no video is at hand.

Tensor legend: N clips, T frames, H, W height and width, 3 colours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

_SHAPES = 2  # at most, in a scene


@dataclass(frozen=True, slots=True)
class _Shape:
    """A disc or a square that moves in a straight line; lengths in halves of the frame's side."""

    colour: torch.Tensor
    start: torch.Tensor
    way: torch.Tensor
    radius: float
    square: bool

    def over(self, frame_3HW: torch.Tensor, time: float) -> torch.Tensor:
        """Draw it over a frame, lit from the upper left."""
        size = frame_3HW.shape[1]
        dx, dy = (axis - at for axis, at in zip(_axes(size), self.start + self.way * time, strict=True))
        away = torch.maximum(dx.abs(), dy.abs()) if self.square else torch.hypot(dx, dy)
        cover = (0.5 - (away - self.radius) * size / 2).clamp(0, 1)  # half covered along the outline
        light = 1 - 0.15 * (dx + dy) / self.radius
        return torch.lerp(frame_3HW, self.colour.view(3, 1, 1) * light, cover)


def draw_clips(count: int, frames: int, size: int, seed: int = 0) -> torch.Tensor:
    """Draw clips of shapes that move over soft gradients, the same for the same arguments.

    Returns:
        `[N, 3, T, H, W]` in [0, 1], float32, on the CPU; H = W = `size` pixels.
    """
    numbers = torch.Generator().manual_seed(seed)
    return torch.stack([_draw(frames, size, numbers, grey=bool(clip % 2)) for clip in range(count)])


def _draw(frames: int, size: int, numbers: torch.Generator, *, grey: bool) -> torch.Tensor:
    """Draw one clip `[3, T, H, W]`."""

    def drawn(*shape: int, least: float = 0.0, most: float = 1.0) -> torch.Tensor:
        return least + (most - least) * torch.rand(shape, generator=numbers)

    plain = drawn(1).expand(3) if grey else drawn(3)
    angle, slope = float(drawn(1, most=2 * math.pi)), float(drawn(1, least=0.05, most=0.35))
    x, y = _axes(size)
    background = plain.view(3, 1, 1) + slope / 2 * (math.cos(angle) * x + math.sin(angle) * y)
    shapes = [
        _Shape(
            colour=drawn(3),
            start=drawn(2, least=-0.7, most=0.7),
            way=drawn(2, least=-0.4, most=0.4),
            radius=float(drawn(1, least=0.25, most=0.6)),
            square=bool(number % 2),
        )
        for number in range(1 + int(drawn(1) * _SHAPES))
    ]
    pictures = []
    for number in range(frames):
        picture = background
        for shape in shapes:
            picture = shape.over(picture, number / max(1, frames - 1))
        pictures.append(picture.clamp(0, 1))
    return torch.stack(pictures, dim=1)


def _axes(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the places of pixels to the right `[1, W]` and down `[H, 1]`, from −1 to 1."""
    places = torch.linspace(-1, 1, size)
    return places.view(1, -1), places.view(-1, 1)
