"""PSNR, SSIM and VMAF of raw videos."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from runtime.media.mp4 import Frames
from runtime.media.quality import PSNR_OF_EQUALS, RawVideo, compare_videos, has_filter, psnr


def raw(path: Path, frames: Frames) -> RawVideo:
    path.write_bytes(frames.tobytes())
    return RawVideo(path, frames.shape[2], frames.shape[1])


@pytest.fixture
def truth() -> Frames:
    y, x = np.mgrid[0:96, 0:96]
    return np.stack(
        [np.stack([(x * 2 + t) % 256, (y + x) % 256, (y * 2) % 256], -1) for t in range(5)]
    ).astype(np.uint8)


def test_psnr_by_its_formula(tmp_path: Path, truth: Frames) -> None:
    noisy = np.clip(truth.astype(int) + np.random.default_rng(0).integers(-9, 10, truth.shape), 0, 255)
    noisy = noisy.astype(np.uint8)
    error = np.mean((noisy.astype(float) - truth) ** 2)
    measured = psnr(noisy, truth)
    assert measured == pytest.approx(10 * math.log10(255**2 / error))


def test_equal_videos_are_perfect(tmp_path: Path, truth: Frames) -> None:
    quality = compare_videos(raw(tmp_path / "a", truth), raw(tmp_path / "b", truth))
    assert quality.psnr == PSNR_OF_EQUALS
    assert quality.ssim == pytest.approx(1.0)
    assert quality.vmaf is None or quality.vmaf > 95


def test_worse_videos_measure_worse(tmp_path: Path, truth: Frames) -> None:
    rng = np.random.default_rng(1)
    reference = raw(tmp_path / "truth", truth)
    measured = []
    for strength in (4, 40):
        noisy = np.clip(truth + rng.normal(0, strength, truth.shape), 0, 255).astype(np.uint8)
        measured.append(compare_videos(raw(tmp_path / str(strength), noisy), reference))
    slight, heavy = measured
    assert slight.psnr > heavy.psnr
    assert slight.ssim > heavy.ssim
    assert slight.vmaf is not None and heavy.vmaf is not None and slight.vmaf > heavy.vmaf


def test_different_lengths_cannot_be_compared(tmp_path: Path, truth: Frames) -> None:
    with pytest.raises(ValueError, match="cannot be compared"):
        psnr(truth[:3], truth)


def test_filters_are_told_apart() -> None:
    assert has_filter("ssim")
    assert has_filter("libvmaf")
    assert not has_filter("no_such_filter")
