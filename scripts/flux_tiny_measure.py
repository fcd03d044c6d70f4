"""Measurements of stills: what a picture shows, and how far two pictures are apart.

Tensor legend: B batch, H height, W width. Pictures are `[B, 3, H, W]`, float32, in [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from flux_tiny_data import PLACES, SIZES, StillScene
from numpy.typing import NDArray
from wan_tiny_measure import background_of, colour_of, shape_mask

PROPERTIES = ("size", "colour", "shape", "place", "background")
_FILLED = {"triangle": 0.5, "circle": 0.785, "square": 1.0}
"""Shape → part of its bounding box that it fills."""
_HEIGHTS = {"triangle": 1.8, "circle": 2.0, "square": 1.8}
"""Shape → height of its bounding box, in radii."""


def found(picture_HW3: NDArray[np.float32]) -> dict[str, str]:
    """Measure each property that a caption names; empty names if no shape is seen."""
    background = background_of(picture_HW3[None])
    mask = shape_mask(picture_HW3, background)
    if mask.sum() < 12:
        return dict.fromkeys(PROPERTIES, "") | {"background": background}
    rows, columns = np.nonzero(mask.any(axis=1))[0], np.nonzero(mask.any(axis=0))[0]
    height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
    filled = float(mask.sum()) / float(height * width)
    shape = min(_FILLED, key=lambda name: abs(_FILLED[name] - filled))
    side = len(mask)
    radius = float(height) / side / _HEIGHTS[shape]
    centre = (
        np.array([columns.mean(), rows.mean() + (0.3 * radius * side if shape == "triangle" else 0)]) + 0.5
    )
    return {
        "size": min(SIZES, key=lambda name: abs(float(np.mean(SIZES[name])) - radius)),
        "colour": colour_of(picture_HW3[None], mask[None]),
        "shape": shape,
        "place": min(
            PLACES, key=lambda name: float(np.linalg.norm(np.asarray(PLACES[name]) - centre / side))
        ),
        "background": background,
    }


def agrees(picture_HW3: NDArray[np.float32], scene: StillScene) -> dict[str, bool]:
    """Compare each property with the caption."""
    seen = found(picture_HW3)
    return {name: seen[name] == getattr(scene, name) for name in PROPERTIES}


@dataclass(frozen=True, slots=True)
class Distance:
    """How far a picture is from the reference.

    Attributes:
        psnr: dB.
        ssim: structural similarity, 1 for equal pictures.
        deep: distance of deep features, 0 for equal pictures.
    """

    psnr: float
    ssim: float
    deep: float


class Distances:
    """Measures pictures against references.

    `deep` is made like LPIPS, without a download: activations of a network, scaled to unit length at each
    place, squared differences, mean over places, sum over layers. The network is flux-tiny's own VAE encoder,
    after each of its three resolutions, and no weights are learned on top. It ranks as LPIPS does only by
    analogy.

    Args:
        vae: VAE whose encoder is used.
    """

    def __init__(self, vae: AutoencoderKL):
        self._encoder = vae.encoder

    @torch.no_grad()
    def measure(self, picture_B3HW: torch.Tensor, truth_B3HW: torch.Tensor) -> Distance:
        error = float((picture_B3HW - truth_B3HW).square().mean())
        psnr = min(100.0, -10.0 * float(np.log10(max(error, 1e-10))))
        deep = sum(
            float((one - other).square().sum(dim=1).mean())
            for one, other in zip(self._features(picture_B3HW), self._features(truth_B3HW), strict=True)
        )
        return Distance(psnr, ssim(picture_B3HW, truth_B3HW), deep)

    def _features(self, picture_B3HW: torch.Tensor) -> list[torch.Tensor]:
        value = self._encoder.conv_in(picture_B3HW * 2.0 - 1.0)
        features = []
        for block in self._encoder.down_blocks:
            value = block(value)
            features.append(F.normalize(value, dim=1))
        return features


def ssim(one_B3HW: torch.Tensor, other_B3HW: torch.Tensor) -> float:
    """Structural similarity, mean over channels and places, with a Gaussian window of 11 pixels and σ 1.5.

    Source: Wang, Bovik, Sheikh, Simoncelli, IEEE TIP 13 (2004), with their constants.
    """
    line = torch.exp(-((torch.arange(11.0) - 5.0) ** 2) / (2 * 1.5**2))
    line = line / line.sum()
    window = (line[:, None] * line).expand(3, 1, 11, 11)

    def mean(value: torch.Tensor) -> torch.Tensor:
        return F.conv2d(value, window, groups=3)

    a, b = mean(one_B3HW), mean(other_B3HW)
    aa, bb = mean(one_B3HW**2) - a * a, mean(other_B3HW**2) - b * b
    ab = mean(one_B3HW * other_B3HW) - a * b
    c1, c2 = 0.01**2, 0.03**2
    return float(((2 * a * b + c1) * (2 * ab + c2) / ((a * a + b * b + c1) * (aa + bb + c2))).mean())
