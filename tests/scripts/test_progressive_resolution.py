"""Latents of two sizes that are one trajectory, and what the bench of progressive resolution compares."""

from __future__ import annotations

import math

import pytest
import torch
from bench_progressive import BOUND, FULL, SHARE, SKIPPING, Result, large_steps, table
from progressive_resolution import (
    bands,
    grown,
    lower_level,
    ratio,
    shrunk,
    shrunk_noise,
    upper_power,
    video_of,
    without_upper_band,
)

SMALL, LARGE = (4, 6), (8, 12)


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(1, 3, 2, *shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_bands_are_the_orthonormal_cosine_transform() -> None:
    """Each number as the definition of the transform says, one cosine at a time."""
    video, found = drawn(3, 5), bands(drawn(3, 5))
    for v in range(3):
        for u in range(5):
            size = math.sqrt((2 - (v == 0)) * (2 - (u == 0)) / 15)
            rows = [math.cos(math.pi * v * (y + 0.5) / 3) for y in range(3)]
            columns = [math.cos(math.pi * u * (x + 0.5) / 5) for x in range(5)]
            wave = torch.outer(*(torch.tensor(one, dtype=torch.float64) for one in (rows, columns)))
            expected = size * (video.double() * wave).sum((-2, -1))
            torch.testing.assert_close(found[..., v, u], expected)
    torch.testing.assert_close(video_of(found), video)


@pytest.mark.parametrize("sigma", [0.98, 0.5])
def test_the_small_video_is_the_lower_band_of_the_large_one(sigma: float) -> None:
    clean, noise = drawn(*LARGE), drawn(*LARGE).flip(-1)
    latents = (1 - sigma) * clean + sigma * noise
    level = lower_level(sigma, ratio(SMALL, LARGE))
    small = (1 - level) * shrunk(clean, SMALL) + level * shrunk_noise(noise, SMALL)
    made = bands(grown(small, noise, sigma))
    expected = sigma * bands(noise)
    expected[..., :4, :6] = bands(latents)[..., :4, :6]
    kept = bands(without_upper_band(latents, noise, sigma, SMALL))
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(kept, expected, rtol=1e-4, atol=1e-5)


def test_a_small_video_keeps_the_mean_and_its_noise_the_variance() -> None:
    flat = torch.full((1, 3, 2, *LARGE), 0.7)
    torch.testing.assert_close(shrunk(flat, SMALL), torch.full((1, 3, 2, *SMALL), 0.7))
    noise = torch.randn(1, 64, 8, *LARGE, generator=torch.Generator().manual_seed(0))
    assert float(shrunk_noise(noise, SMALL).var()) == pytest.approx(1.0, abs=0.03)


def test_the_level_of_the_small_video_is_that_of_a_sampler_with_another_shift() -> None:
    def level(shift: float, place: float) -> float:
        return shift * place / (1 + (shift - 1) * place)

    for place in (0.9, 0.5, 0.1):
        assert lower_level(level(3.0, place), 2.0) == pytest.approx(level(1.5, place))


def test_power_of_the_upper_band() -> None:
    video = drawn(*LARGE)
    lower, upper = bands(video), bands(video)
    lower[..., 4:, :] = lower[..., 6:] = 0.0
    upper[..., :4, :6] = 0.0
    assert upper_power(video_of(lower), SMALL) == pytest.approx(0.0, abs=1e-9)
    assert upper_power(video_of(upper), SMALL) == pytest.approx(1.0)
    assert upper_power(video_of(lower + upper), SMALL) == pytest.approx(
        float(upper.square().sum() / (bands(video).square().sum() - lower[..., 0, 0].square().sum()))
    )


@pytest.mark.parametrize("budget", [4, 14])
@pytest.mark.parametrize("switch", [2, 4, 19])
def test_both_ways_cost_the_same_within_half_a_step(budget: int, switch: int) -> None:
    assert abs(large_steps(budget, switch) + switch * SHARE - budget) <= 0.5


def test_the_table_compares_videos_of_the_same_prompt() -> None:
    made = [
        *(Result(number, FULL, 0, 0, 0, 50, 0.5, number < 2) for number in range(3)),
        Result(0, SKIPPING, 8, 0, 0, 8, 40.0, True),
        Result(1, SKIPPING, 8, 0, 0, 8, 30.0, False),
        Result(2, SKIPPING, 8, 0, 0, 8, 99.0, True),  # a prompt that is not complete
        Result(0, BOUND, 8, 2, 2, 8, 39.0, True),
        Result(1, BOUND, 8, 2, 2, 8, 31.0, True),
    ]
    text = table(made)
    assert "| 8 | skipping alone |  | 0 + 8 | 8.00 | 35.0 (30.0) |  | 1 of 2 |" in text
    assert "| 8 | exact lower band | 2 | 2 + 8 | 8.24 | 35.0 (31.0) | 1 of 2 | 2 of 2 |" in text
    assert "right in 2 of 2 videos. Of the power of its latents, 50 % is in the upper band." in text
