"""`lockstep compare`: the table, the JSON and the side-by-side video."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from launch import cli
from runtime.measure.compare import side_by_side
from runtime.media.quality import RawVideo

ARGUMENTS = ["--size", "64x48", "--frames", "5", "--steps", "8", "--max-sequence-length", "32"]


def test_presets_prompts_and_seeds_are_all_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "side.mp4"
    prompts = ["a red circle growing on a white background", "a blue square moving up on a gray background"]
    presets = ["--preset", "paper", "--preset", "paper-fast"]
    seeds = ["--seed", "1", "--seed", "2"]
    assert cli.run(["compare", *prompts, *ARGUMENTS, *presets, *seeds, "--out", str(out), "--json"]) == 0
    stdout, stderr = capfd.readouterr()
    assert json.loads(stdout) == {"out": str(out), **json.loads(out.with_suffix(".json").read_text())}
    assert "paper-fast" in stderr and "PSNR" in stderr
    content = json.loads(out.with_suffix(".json").read_text())
    assert len(content["results"]) == 3 * 2 * 2
    rows = {row["preset"]: row for row in content["rows"]}
    assert rows["off"]["psnr"] is None and rows["off"]["nfe"] == 8 and rows["off"]["speedup"] == 1.0
    assert rows["paper"]["nfe"] == 6 and 10 < rows["paper"]["psnr"] < 100
    own = [r["quality"]["psnr"] for r in content["results"] if r["preset"] == "paper"]
    assert rows["paper"]["psnr"] == pytest.approx(sum(own) / 4)


def test_side_by_side_puts_videos_in_order_under_their_labels(tmp_path: Path) -> None:
    videos = []
    for value in (50, 200):
        path = tmp_path / str(value)
        path.write_bytes(np.full((3, 32, 64, 3), value, np.uint8).tobytes())
        videos.append(RawVideo(path, 64, 32))
    frames = side_by_side(videos, ["off", "paper"])
    assert frames.shape == (3, 48, 128, 3)
    assert (frames[:, 16:, :64] == 50).all() and (frames[:, 16:, 64:] == 200).all()
    assert (frames[:, :16] < 128).any()  # text on the labels
