"""Wan2.2's TI2V-5B: another VAE, a timestep for each token, and videos from text or from an image."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from PIL import Image

from runtime.engine import Engine
from runtime.errors import BadRequestError
from runtime.media.latents import write_latents
from runtime.media.mp4 import FrameBuffer, Frames
from runtime.models.base import KnownFrames
from runtime.models.configs import usual_config
from runtime.parallel.topology import Degrees
from runtime.request.config import Config, Dtypes, Tiles, load_config
from runtime.request.video_request import VideoRequest
from runtime.sampling.estimate import Estimate
from runtime.sampling.result import Result
from runtime.sampling.segments import denoise_segments
from tests.conditioned import (
    config_of,
    denoised,
    denoised_on,
    sampled,
    write_image,
    write_ti2v,
)
from tests.ranks import run_ranks
from tests.stopping import stop_and_resume

Ask = Callable[..., VideoRequest]
SHIFT, STEPS = 5.0, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ti2v(tmp_path_factory.mktemp("ti2v"))


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_image(tmp_path_factory.mktemp("image") / "start.png"))


@pytest.fixture(scope="module")
def own(config: Config, folder: Path) -> Config:
    return sampled(config_of(config, folder), "unipc", SHIFT)


@pytest.fixture(scope="module")
def ti2v(own: Config) -> Engine:
    return Engine(own)


@pytest.fixture(scope="module")
def ask(own: Config) -> Ask:
    def make(**fields: object) -> VideoRequest:
        given = {"width": 64, "height": 96, "frames": 9, "steps": STEPS, "seed": 3, "spectrum": "off"}
        return own.request("a red circle", **{**given, **fields})

    return make


def made(engine: Engine, request: VideoRequest) -> Frames:
    sink = FrameBuffer()
    engine.generate(request, [sink])
    return sink.frames


def by_pipeline(engine: Engine, request: VideoRequest, dtype: torch.dtype = torch.float32) -> Frames:
    """Frames of diffusers' pipeline for text, or the one for an image."""
    kind, given = WanPipeline, {}
    if request.image is not None:
        kind, given = WanImageToVideoPipeline, {"image": Image.open(request.image)}
    pipeline: Any = kind.from_pretrained(engine.model.path, dtype=torch.float32)
    assert pipeline.config.expand_timesteps
    pipeline.transformer = type(pipeline.transformer).from_pretrained(
        engine.model.path / "transformer", dtype=dtype
    )
    pipeline.scheduler = type(engine.profile.sampler).from_config(engine.profile.sampler.config)
    pipeline.set_progress_bar_config(disable=True)
    if engine.config.tiles is not None:
        tiles = engine.config.tiles
        pipeline.vae.enable_tiling(tiles.size, tiles.size, tiles.stride, tiles.stride)
    frames = pipeline(
        **given, prompt=request.prompt, negative_prompt=request.negative, height=request.height,
        width=request.width, num_frames=request.frames, num_inference_steps=request.steps,
        guidance_scale=request.guidance, num_videos_per_prompt=request.videos, output_type="np",
        generator=torch.Generator("cpu").manual_seed(request.seed),
    ).frames[0]  # fmt: skip
    return (frames * 255).round().astype(np.uint8)


@pytest.mark.parametrize("kind", ["unipc", "euler"])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("starts", ["text", "image"])
def test_its_frames_are_the_pipelines_to_the_bit(
    ti2v: Engine, own: Config, ask: Ask, image: str, kind: str, guidance: float, starts: str
) -> None:
    engine = ti2v if kind == "unipc" else Engine(sampled(own, kind, SHIFT))
    request = ask(guidance=guidance, image=image if starts == "image" else None)
    assert np.array_equal(made(engine, request), by_pipeline(engine, request))


def test_a_transformer_in_bfloat16_is_the_pipelines_too(own: Config, ask: Ask, image: str) -> None:
    """The image's latents are decoded as they were encoded, not as the transformer sees them."""
    dtype = Dtypes(transformer="bfloat16", text_encoder="float32", vae="float32")
    engine = Engine(own.model_copy(update={"dtype": dtype}))
    request = ask(image=image)
    assert np.array_equal(made(engine, request), by_pipeline(engine, request, torch.bfloat16))


def test_tiles_are_the_pipelines(own: Config, ask: Ask) -> None:
    engine = Engine(own.model_copy(update={"tiles": Tiles(size=64, stride=48)}))
    request = ask(width=128)
    assert np.array_equal(made(engine, request), by_pipeline(engine, request))
    assert not np.array_equal(made(engine, request), made(Engine(own), request))


def test_the_image_is_the_first_frame_and_what_the_others_depend_on(
    ti2v: Engine, ask: Ask, image: str, tmp_path: Path
) -> None:
    run = ti2v.prepare(ti2v.plan(ask(image=image)))
    assert run.known is not None and run.known.shape[2] == 1
    first, other, text = (
        denoised(ti2v, ask(image=one)) for one in (image, str(write_image(tmp_path / "b.png", seed=1)), None)
    )
    assert torch.equal(first[:, :, :1], run.known)
    assert not torch.equal(first[:, :, 1:], other[:, :, 1:])
    assert not torch.equal(first[:, :, 1:], text[:, :, 1:])


def test_previews_show_the_frames_that_are_known(ti2v: Engine, ask: Ask, image: str) -> None:
    plan = ti2v.plan(ask(image=image))
    run, seen = ti2v.prepare(plan), []
    denoise_segments(ti2v.ranks, run, Result(plan), on_estimate=seen.append)
    assert len(seen) == STEPS
    for estimate in seen:
        assert isinstance(estimate, Estimate)
        assert torch.equal(estimate.clean()[:, :, :1], run.known)
        assert estimate.clean(2).shape[2] == 2


@pytest.mark.parametrize("starts", ["text", "image"])
def test_a_longer_video_is_made_of_windows(ti2v: Engine, ask: Ask, image: str, starts: str) -> None:
    """From text they are denoised together; from an image each begins with the latents of the one before."""
    request = ask(frames=21, image=image if starts == "image" else None)
    plan = ti2v.plan(request)
    assert (len(plan.windows), plan.segments) == (3, 1 if starts == "text" else 3)
    video = denoised(ti2v, request)
    if starts == "image":  # by hand: the second window, with one known frame
        run = ti2v.prepare(plan)
        known = KnownFrames(video[:, :, 2:3])
        network, sampler = run.networks[1].conditioned(known), plan.fresh_sampler()
        latents = run.noise_BCFHW[:, :, plan.windows.slice(1)].clone()
        for step, timestep in enumerate(sampler.timesteps):
            latents[:, :, :1] = video[:, :, 2:3]  # whatever was there
            own = network.at(step)
            velocity = own.compute(latents, own.time(timestep.expand(1))).velocity_BCFHW
            latents = sampler.step(velocity, timestep, latents, return_dict=False)[0]
        assert torch.equal(latents[:, :, 1:], video[:, :, 3:5])


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("starts", "degrees"),
    [("text", Degrees(ulysses=2)), ("image", Degrees(cfg=2)), ("image", Degrees(ring=2))],
    ids=str,
)
def test_many_ranks_make_the_same_video(
    ti2v: Engine, ask: Ask, image: str, starts: str, degrees: Degrees
) -> None:
    request = ask(frames=13, image=image if starts == "image" else None)
    alone = denoised(ti2v, request)
    first, second = run_ranks(2, denoised_on, ti2v.config, request, degrees)
    assert torch.equal(first, second)
    assert (first - alone).norm() <= 1e-5 * alone.norm()


@pytest.mark.parametrize("starts", ["text", "image"])
def test_it_resumes_to_the_bit(ti2v: Engine, ask: Ask, image: str, tmp_path: Path, starts: str) -> None:
    request = ask(frames=13, steps=10, spectrum="paper", image=image if starts == "image" else None)
    at = [3, 12] if starts == "image" else [3]  # in the second window, too
    found = stop_and_resume(ti2v.ranks, ti2v.config, request, tmp_path, at)
    assert [resumed for resumed, _, _ in found] == [step + 3 for step in at]
    assert all(frames and decisions for _, frames, decisions in found)


def test_a_finished_video_goes_on_from_its_latents(ti2v: Engine, ask: Ask, tmp_path: Path) -> None:
    before = denoised(ti2v, ask(frames=9))
    path = tmp_path / "before.safetensors"
    write_latents(path, before, "")
    longer = denoised(ti2v, ask(frames=17, extend={"file": str(path), "frames": 9}))
    assert torch.equal(longer[:, :, :3], before) and longer.shape[2] == 5


def test_several_videos_begin_with_the_image(ti2v: Engine, ask: Ask, image: str) -> None:
    both = denoised(ti2v, ask(image=image, videos=2))
    assert torch.equal(both[0, :, 0], both[1, :, 0]) and not torch.equal(both[0, :, 1], both[1, :, 1])


def test_a_size_of_half_a_token_is_refused(ti2v: Engine, own: Config, ask: Ask, folder: Path) -> None:
    with pytest.raises(BadRequestError, match=r"width: 48 given; .* needs a multiple of 32"):
        ti2v.plan(ask(width=48))
    narrow = own.model_copy(update={"bounds": own.bounds.model_copy(update={"pixels": 32})})
    assert Engine(narrow).model.path == folder
    with pytest.raises(BadRequestError, match="width: 48 given; must be a multiple of 32"):
        narrow.request("a red circle", width=48)


def test_its_usual_config_is_that_of_5b(folder: Path) -> None:
    usual = usual_config(str(folder))
    assert (usual.fps, usual.defaults.frames, usual.bounds.pixels) == (24, 121, 32)
    assert (
        usual.scheduler.shift == SHIFT
        and usual.architecture != load_config("wan2.2-ti2v-5b-720p").architecture
    )
    assert usual_config("Wan-AI/Wan2.1-T2V-14B-Diffusers").lora == ()
