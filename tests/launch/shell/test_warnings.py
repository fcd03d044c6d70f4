"""What is done but may not be what was meant is said at the end, and stands in the report."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import runtime
from launch import cli
from runtime.media.mp4 import ColourWatch

SMALL = ["--size", "64x48", "--frames", "5", "--steps", "3", "--max-sequence-length", "32"]
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def blind(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a model whose decoder shows nothing, whatever it is given."""
    folder = tmp_path_factory.mktemp("blind")
    model = folder / "model"
    shutil.copytree(Path(runtime.__file__).parent / "models" / "wan-tiny", model)
    weights = load_file(model / "vae" / WEIGHTS)
    for name in ("decoder.conv_out.weight", "decoder.conv_out.bias"):
        weights[name] = torch.full_like(weights[name], -1.0 if name.endswith("bias") else 0.0)
    save_file(weights, model / "vae" / WEIGHTS, {"format": "pt"})
    config = folder / "blind.yaml"
    config.write_text(f"model: {model}\nfps: 8\ndefaults: {{width: 64, height: 48, frames: 5}}\n")
    return config


def test_a_compared_video_of_one_colour_is_no_success(
    blind: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = [*SMALL, "--config", str(blind), "--out", str(tmp_path / "a.mp4"), "--compare"]
    assert cli.run(["generate", "a red circle", *options]) == 0
    assert "warning: a.mp4 shows nothing: every pixel of every frame is #000000" in capfd.readouterr().err
    report = json.loads((tmp_path / "a.json").read_text())
    assert report["quality"]["psnr"] == 100.0
    assert len(report["warnings"]) == 1 and "PSNR, SSIM and VMAF are meaningless" in report["warnings"][0]

    options = [*SMALL, "--config", str(blind), "--out", str(tmp_path / "b.mp4"), "--preset", "paper-fast"]
    assert cli.run(["compare", "a red circle", *options]) == 0
    assert "warning: 'paper-fast' of 'a red circle', seed 0, shows nothing" in capfd.readouterr().err
    assert len(json.loads((tmp_path / "b.json").read_text())["warnings"]) == 2  # the full sampler's, too


def test_a_video_that_shows_something_is_not_warned_of(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["generate", "a red circle", *SMALL, "--out", str(tmp_path / "a.mp4")]) == 0
    assert "warning" not in capfd.readouterr().err
    assert json.loads((tmp_path / "a.json").read_text())["warnings"] == []


@pytest.mark.parametrize(
    ("at", "colour"), [(None, "#07090b"), ((0, 0, 0, 0), None), ((8, 15, 15, 2), None), ((4, 3, 2, 1), None)]
)
def test_one_sample_that_differs_is_enough(at: tuple[int, ...] | None, colour: str | None) -> None:
    frames = np.broadcast_to(np.array([7, 9, 11], np.uint8), (9, 16, 16, 3)).copy()
    if at is not None:
        frames[at] += 1
    watch = ColourWatch()
    for start, end in ((0, 1), (1, 5), (5, 5), (5, 9)):
        watch.write(frames[start:end])
    assert watch.colour == colour


def test_frames_of_one_colour_each_are_something_when_they_change() -> None:
    watch = ColourWatch()
    for level in (0, 255):
        watch.write(np.full((1, 16, 16, 3), level, np.uint8))
    assert watch.colour is None
    assert ColourWatch().colour is None
