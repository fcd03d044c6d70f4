"""A pipeline of diffusers with Spectrum makes what Lockstep's engine makes with the same preset file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanPipeline

from runtime.engine import Engine
from runtime.media.mp4 import FrameBuffer
from runtime.request.config import EMBEDDED_MODELS
from runtime.request.video_request import VideoRequest
from spectrum.diffusers import enable, report

PAPER = """
stream: {stream}
schedule: {{kind: paper, warmup: 4, window: 2, alpha: 0.75}}
predictor: {{kind: chebyshev, degree: 4, ridge: 0.1, blend: 0.8}}
"""
PRESETS = {
    "feature": PAPER.format(stream="feature"),
    "velocity": PAPER.format(stream="velocity"),
    "universal": "stream: velocity\nschedule: {kind: universal, nfe: 6}\npredictor: {kind: universal}\n",
}


@pytest.mark.parametrize("preset", PRESETS)
def test_frames_are_those_of_the_engine(
    engine: Engine, small: Callable[..., VideoRequest], tmp_path: Path, preset: str
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(PRESETS[preset])
    request = small(steps=12, guidance=5.0, negative="", spectrum=str(file))
    sink = FrameBuffer()
    result = engine.generate(request, [sink])

    pipe = WanPipeline.from_pretrained(EMBEDDED_MODELS / "wan-tiny", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    arguments = {
        "prompt": request.prompt, "negative_prompt": "", "width": request.width, "height": request.height,
        "num_frames": request.frames, "num_inference_steps": 12, "guidance_scale": 5.0,
        "max_sequence_length": request.max_sequence_length, "output_type": "np",
    }  # fmt: skip
    plain = pipe(**arguments, generator=torch.Generator().manual_seed(request.seed)).frames[0]
    enable(pipe, file)
    frames = pipe(**arguments, generator=torch.Generator().manual_seed(request.seed)).frames[0]

    told = report(pipe)["transformer"]
    assert list(told.computed) == result.computed["cond"] == result.computed["uncond"]
    ours = sink.frames.astype(int)
    assert np.abs(ours - as_bytes(frames)).max() <= 1
    assert np.abs(ours - as_bytes(plain)).max() > 1  # forecasts are seen


def as_bytes(frames: np.ndarray) -> np.ndarray:
    return (frames * 255).round().astype(int)
