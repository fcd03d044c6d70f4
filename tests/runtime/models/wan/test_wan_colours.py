"""Colours of wan-tiny's latents: as good as a linear map gets, fitted once, kept by what the VAE is."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from wan_tiny_data import clip_batch

from runtime.engine import Engine
from runtime.models.colours import LatentColours, areas, fit_colours
from runtime.models.wan.colours import WanColours, encode, fit_vae
from runtime.models.wan.vae import decode_frames

Open = Callable[[], WanColours]


@pytest.fixture(scope="module")
def fitted(engine: Engine) -> LatentColours:
    return fit_vae(engine.loaded.decoder.vae)  # type: ignore[attr-defined]


@pytest.fixture
def open_colours(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Open:
    """As a new process would, with a cache folder of this test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return lambda: WanColours(engine.model, engine.loaded.decoder)  # type: ignore[arg-type]


def kept(tmp_path: Path) -> Path:
    (file,) = (tmp_path / "cache" / "lockstep" / "colours").iterdir()
    return file


def psnr(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(-10 * (one - other).square().mean().log10())


@torch.no_grad()
def test_it_shows_what_the_vae_decodes(engine: Engine, fitted: LatentColours) -> None:
    """Better by far than one colour, and nearly as good as a linear map that has seen these very videos."""
    vae = engine.loaded.decoder.vae  # type: ignore[attr-defined]
    clips = torch.cat([clip_batch(seed=5, first=number, count=1)[0][:, :, :9] for number in (3, 77, 130)])
    latents = encode(vae, clips * 0.5 + 0.5)
    frames = torch.cat(list(decode_frames(vae, latents)), dim=1)
    shown, true = fitted.rgb(latents), areas(frames, latents.shape[2:])
    mean, grey = true.mean((0, 1, 2, 3)).expand_as(true), torch.full_like(true, 0.5)
    best = fit_colours(latents, frames).rgb(latents)
    assert psnr(shown, true) > max(psnr(mean, true), psnr(grey, true)) + 6
    assert psnr(shown, true) > psnr(best, true) - 6


def test_it_is_fitted_once_and_read_later(open_colours: Open, fitted: LatentColours, tmp_path: Path) -> None:
    first = open_colours()()
    assert torch.equal(first.weights_C3, fitted.weights_C3)  # the same every time
    content = json.loads(kept(tmp_path).read_text())
    kept(tmp_path).write_text(json.dumps(content | {"bias": [0.25, 0.5, 0.75]}))
    assert open_colours()().bias_3.tolist() == [0.25, 0.5, 0.75]


def test_a_damaged_file_is_fitted_again(open_colours: Open, fitted: LatentColours, tmp_path: Path) -> None:
    open_colours()()
    whole = kept(tmp_path).read_text()
    kept(tmp_path).write_text(whole[:100])
    assert torch.equal(open_colours()().weights_C3, fitted.weights_C3)
    assert kept(tmp_path).read_text() == whole


def test_another_vae_has_another_file(open_colours: Open, engine: Engine, tmp_path: Path) -> None:
    colours = open_colours()
    colours()
    other = tmp_path / "model"
    (other / "vae").mkdir(parents=True)
    (other / "vae" / "config.json").write_text("{}")
    folder = dataclasses.replace(engine.model, path=other)
    WanColours(folder, engine.loaded.decoder)()  # type: ignore[arg-type]
    assert len(list((tmp_path / "cache" / "lockstep" / "colours").iterdir())) == 2


def test_a_cache_that_cannot_be_written_is_a_warning(
    open_colours: Open, fitted: LatentColours, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        assert torch.equal(open_colours()().weights_C3, fitted.weights_C3)
    assert "is made again next time" in caplog.text
