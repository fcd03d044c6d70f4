"""Spectral maths of progressive resolution: latents of two sizes that are one trajectory.

A video of lower resolution is the lower band of the cosine transform of the larger one. With x = (1 − σ) x₀ +
σ ε and an orthonormal transform, r the square root of the ratio of areas, the lower band of x at σ is a small
video at a noise level σ' of its own: its signal is 1/r of the band's, and its noise has the same variance. So
σ' / (1 − σ') = σ / (1 − σ) / r; in flow matching this is a shift of 1/r. The upper band, of which the small
video says nothing, gets noise of level σ.

Tensor legend: B batch, C latent channels, F latent frames, H, W latent height and width.

Source: "Spectral Progressive Diffusion for Efficient Image and Video Generation" (arXiv 2605.18736).
"""

from __future__ import annotations

import math

import torch


def cosines(size: int) -> torch.Tensor:
    """Orthonormal cosine transform (DCT-II) as a matrix `[size, size]`, float64: a frequency in each row."""
    frequency, place = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    matrix = torch.cos(math.pi / size * (place.double() + 0.5) * frequency) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix


def bands(video_BCFHW: torch.Tensor) -> torch.Tensor:
    """Cosine transform over height and width, float64."""
    height, width = (cosines(size) for size in video_BCFHW.shape[-2:])
    return height @ video_BCFHW.double() @ width.T


def video_of(bands_BCFHW: torch.Tensor) -> torch.Tensor:
    """Inverse of `bands`, float32."""
    height, width = (cosines(size) for size in bands_BCFHW.shape[-2:])
    return (height.T @ bands_BCFHW @ width).float()


def ratio(small: tuple[int, int], large: tuple[int, int]) -> float:
    """Square root of the ratio of areas, r > 1."""
    return math.sqrt(math.prod(large) / math.prod(small))


def lower_level(sigma: float, r: float) -> float:
    """Noise level of the small video when that of the large one is σ."""
    return sigma / (sigma + r * (1 - sigma))


def shrunk_noise(noise_BCFHW: torch.Tensor, small: tuple[int, int]) -> torch.Tensor:
    """Lower band of noise, as noise `[B, C, F, *small]` of the same variance."""
    return video_of(bands(noise_BCFHW)[..., : small[0], : small[1]])


def shrunk(clean_BCFHW: torch.Tensor, small: tuple[int, int]) -> torch.Tensor:
    """Lower band of clean latents, as clean latents `[B, C, F, *small]` of the same mean."""
    return shrunk_noise(clean_BCFHW, small) / ratio(small, tuple(clean_BCFHW.shape[-2:]))


def grown(small_BCFHW: torch.Tensor, noise_BCFHW: torch.Tensor, sigma: float) -> torch.Tensor:
    """Latents at σ, whose lower band is the small video at `lower_level(σ, r)` and whose upper band is noise.

    Args:
        small_BCFHW: the small video.
        noise_BCFHW: noise of the large one, of which that of the small one is the lower band.
        sigma: noise level, 0 < σ < 1.
    """
    small, large = tuple(small_BCFHW.shape[-2:]), tuple(noise_BCFHW.shape[-2:])
    scale = sigma / lower_level(sigma, ratio(small, large))
    grown_BCFHW = sigma * bands(noise_BCFHW)
    grown_BCFHW[..., : small[0], : small[1]] = scale * bands(small_BCFHW)
    return video_of(grown_BCFHW)


def without_upper_band(
    latents_BCFHW: torch.Tensor, noise_BCFHW: torch.Tensor, sigma: float, small: tuple[int, int]
) -> torch.Tensor:
    """Latents at σ whose upper band is replaced by noise: what a change of resolution leaves at best."""
    kept_BCFHW = sigma * bands(noise_BCFHW)
    kept_BCFHW[..., : small[0], : small[1]] = bands(latents_BCFHW)[..., : small[0], : small[1]]
    return video_of(kept_BCFHW)


def upper_power(clean_BCFHW: torch.Tensor, small: tuple[int, int]) -> float:
    """Share of the upper band in the power of clean latents, without their mean over a frame."""
    squares_BCFHW = bands(clean_BCFHW).square()
    squares_BCFHW[..., 0, 0] = 0.0
    lower = float(squares_BCFHW[..., : small[0], : small[1]].sum())
    return 1.0 - lower / float(squares_BCFHW.sum())
