"""Wan2.2's I2V A14B: two transformers, and an image that enters as latents alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline
from PIL import Image

from runtime.engine import Engine
from runtime.errors import BadRequestError
from runtime.media.mp4 import FrameBuffer
from runtime.parallel.topology import Degrees
from runtime.profile import ModelProfile
from runtime.request.config import Config
from runtime.request.video_request import VideoRequest
from tests.conditioned import (
    EXPERTS,
    config_of,
    denoised,
    denoised_on,
    sampled,
    write_image,
    write_two_experts,
)
from tests.ranks import run_ranks
from tests.stopping import stop_and_resume

Ask = Callable[..., VideoRequest]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_two_experts("WanImageToVideoPipeline", tmp_path_factory.mktemp("i2v"), boundary=0.9)
    assert not (folder / "image_encoder").exists()
    return folder


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_image(tmp_path_factory.mktemp("image") / "start.png")


@pytest.fixture(scope="module")
def own(config: Config, folder: Path) -> Config:
    return sampled(config_of(config, folder), "unipc", 5.0)


@pytest.fixture(scope="module")
def i2v(own: Config) -> Engine:
    return Engine(own)


@pytest.fixture(scope="module")
def ask(own: Config, image: Path) -> Ask:
    def make(**fields: object) -> VideoRequest:
        given = {"width": 64, "height": 48, "frames": 9, "steps": 8, "guidance": 4.0, "guidance_2": 2.5}
        given |= {"image": str(image), "seed": 3, "spectrum": "off"}
        return own.request("a red circle", **{**given, **fields})

    return make


@pytest.mark.parametrize("kind", ["unipc", "euler"])
@pytest.mark.parametrize(
    ("guidance", "guidance_2", "words"), [(4.0, 2.5, 512), (1.0, None, 512), (4.0, None, 64)]
)
def test_one_window_is_the_pipelines_to_the_bit(
    i2v: Engine, own: Config, image: Path, ask: Ask, kind: str, guidance: float, guidance_2: float, words: int
) -> None:
    engine = i2v if kind == "unipc" else Engine(sampled(own, kind, 5.0))
    request = ask(guidance=guidance, guidance_2=guidance_2, max_sequence_length=words)
    pipeline = WanImageToVideoPipeline.from_pretrained(engine.model.path, dtype=torch.float32)
    pipeline.text_encoder.float()
    pipeline.scheduler = type(engine.profile.sampler).from_config(engine.profile.sampler.config)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        image=Image.open(image), prompt=request.prompt, negative_prompt=request.negative, height=48, width=64,
        num_frames=9, num_inference_steps=8, guidance_scale=guidance, guidance_scale_2=guidance_2,
        max_sequence_length=words, output_type="np",
        generator=torch.Generator("cpu").manual_seed(request.seed),
    ).frames[0]  # fmt: skip
    sink = FrameBuffer()
    result = engine.generate(request, [sink])
    assert np.array_equal(sink.frames, (theirs * 255).round().astype(np.uint8))
    experts = [EXPERTS[step.timestep < 900] for step in result.steps]
    assert [step.expert for step in result.steps] == experts and set(experts) == set(EXPERTS)


def test_the_image_is_what_the_video_depends_on(i2v: Engine, ask: Ask, tmp_path: Path) -> None:
    other = write_image(tmp_path / "other.png", seed=1)
    assert not torch.equal(denoised(i2v, ask()), denoised(i2v, ask(image=str(other))))
    with pytest.raises(BadRequestError, match=r"image: missing; .* makes videos from an image"):
        ModelProfile(i2v.config).check(ask(image=None))


@pytest.mark.timeout(240)
def test_a_longer_video_goes_through_both_experts_in_each_window_on_any_ranks(i2v: Engine, ask: Ask) -> None:
    request = ask(frames=21)
    assert i2v.plan(request).segments == 3
    alone = denoised(i2v, request)
    for degrees in (Degrees(cfg=2), Degrees(ulysses=2)):
        first, second = run_ranks(2, denoised_on, i2v.config, request, degrees)
        assert torch.equal(first, second)
        assert (first - alone).norm() <= 1e-5 * alone.norm()


def test_it_resumes_to_the_bit_on_both_sides_of_each_switch(i2v: Engine, ask: Ask, tmp_path: Path) -> None:
    """Of the second window, too, which begins with the first expert again."""
    request = ask(frames=13, spectrum="paper")
    steps = len(i2v.plan(request).course.numbers)
    first = i2v.plan(request).course.numbers.index(1)
    at = [first - 3, first - 2, steps + first - 3, steps + first - 2]
    found = stop_and_resume(i2v.ranks, i2v.config, request, tmp_path, at)
    assert [resumed for resumed, _, _ in found] == [step + 3 for step in at]
    assert all(frames and decisions for _, frames, decisions in found)
