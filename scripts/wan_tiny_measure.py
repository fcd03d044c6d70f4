"""Measurements of a clip's pixels: the shape's colour, the background, and the motion.

They are simple and not learned. On rendered clips they are always right (tests/scripts), so errors in a
generated video are the model's.

Tensor legend: F frames, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from wan_tiny_data import BACKGROUNDS, COLOURS, Scene

_DISTINCT = 0.30  # distance in RGB at which a pixel belongs to the shape and not to the background
_LEAST_PIXELS = 12  # a shape smaller than this is not seen


@dataclass(frozen=True, slots=True)
class Finding:
    """Measured properties; a name is empty if no shape was found."""

    colour: str
    background: str
    motion: str

    def agrees(self, scene: Scene) -> dict[str, bool]:
        """Compare each property with the caption."""
        return {
            name: getattr(self, name) == getattr(scene, name) for name in ("colour", "background", "motion")
        }


def measure(frames_FHW3: NDArray[np.float32]) -> Finding:
    """Find the background, the shape's colour and its motion in frames in [0, 1]."""
    background = background_of(frames_FHW3)
    masks = np.stack([shape_mask(frame, background) for frame in frames_FHW3])
    areas = masks.sum(axis=(1, 2)).astype(float)
    if np.median(areas) < _LEAST_PIXELS:
        return Finding("", background, "")
    return Finding(colour_of(frames_FHW3, masks), background, _motion(masks, areas))


def shape_mask(frame_HW3: NDArray[np.float32], background: str) -> NDArray[np.bool_]:
    """Pixels of the shape `[H, W]`."""
    mask: NDArray[np.bool_] = _without_gradient(frame_HW3) > _DISTINCT
    if background != "brown":  # the others have no colour of their own: what has is the shape, not its shadow
        mask &= _saturation(frame_HW3) > 0.25
    return mask


def _border(frames: NDArray[np.float32], width: int = 6) -> NDArray[np.float32]:
    """Pixels of the frame's border, which the shape rarely reaches, `[…, pixels, 3]`."""
    top, bottom = frames[..., :width, :, :], frames[..., -width:, :, :]
    left, right = frames[..., width:-width, :width, :], frames[..., width:-width, -width:, :]
    parts = [part.reshape(*part.shape[:-3], -1, 3) for part in (top, bottom, left, right)]
    return np.concatenate(parts, axis=-2)


def background_of(frames: NDArray[np.float32]) -> str:
    return _nearest(np.median(_border(frames).reshape(-1, 3), axis=0), BACKGROUNDS)


def _without_gradient(frame_HW3: NDArray[np.float32]) -> NDArray[np.float32]:
    """Distance in RGB of every pixel from a plane fitted to the frame's border."""
    height, width, _ = frame_HW3.shape
    y, x = np.mgrid[0:height, 0:width]
    terms = np.stack([np.ones_like(x), x / width, y / height], axis=-1).astype(np.float32)
    plane, *_ = np.linalg.lstsq(_border(terms), _border(frame_HW3), rcond=None)
    return np.linalg.norm(frame_HW3 - terms @ plane, axis=-1)


def _saturation(frames: NDArray[np.float32]) -> NDArray[np.float32]:
    return frames.max(axis=-1) - frames.min(axis=-1)


def colour_of(frames: NDArray[np.float32], masks: NDArray[np.bool_]) -> str:
    """The named colour of the same hue: shading changes brightness, not the ratio of the channels."""
    pixel = np.median(frames[masks], axis=0)
    hues = {name: _direction(np.asarray(colour)) for name, colour in COLOURS.items()}
    return _nearest(_direction(pixel), hues)


def _direction(colour: NDArray[np.float64]) -> NDArray[np.float64]:
    centred = colour - colour.mean()
    return centred / max(float(np.linalg.norm(centred)), 1e-6)


def _motion(masks: NDArray[np.bool_], areas: NDArray[np.float64]) -> str:
    height, width = masks.shape[1:]
    y, x = np.mgrid[0:height, 0:width]
    seen = areas >= _LEAST_PIXELS
    centres = np.stack(
        [
            (masks[seen] * axis).sum(axis=(1, 2)) / areas[seen] / size
            for axis, size in ((x, width), (y, height))
        ],
        axis=-1,
    )
    if len(centres) < len(masks) // 2:
        return ""
    third = max(1, len(areas) // 4)
    growth = math.log((areas[-third:].mean() + 1) / (areas[:third].mean() + 1))
    path = float(np.linalg.norm(np.diff(centres, axis=0), axis=-1).sum())
    net_x, net_y = centres[-1] - centres[0]
    spread = float(np.ptp(centres, axis=0).max())
    if abs(growth) > 0.7 and spread < 0.25:
        return "growing" if growth > 0 else "shrinking"
    if path > 0.6 and math.hypot(net_x, net_y) < 0.5 * path:
        return "circling"
    if spread < 0.12:
        return ""
    if abs(net_x) >= abs(net_y):
        return "right" if net_x > 0 else "left"
    return "down" if net_y > 0 else "up"


def _nearest(value: NDArray[np.floating], named: Mapping[str, ArrayLike]) -> str:
    return min(named, key=lambda name: float(np.linalg.norm(value - np.asarray(named[name]))))
