"""VACE: videos from text, from an image, and their extension, on a model with random weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanVACEPipeline
from PIL import Image

from runtime.checkpoint.folder import Checkpoints
from runtime.engine import Engine
from runtime.errors import BadRequestError, CancelledError
from runtime.media.mp4 import FrameBuffer, Frames
from runtime.models.folder import find_model
from runtime.parallel.topology import Degrees
from runtime.request.config import Config
from runtime.request.memory import Memory
from runtime.request.video_request import VideoRequest
from runtime.sampling.commands import Command
from runtime.sampling.denoise import StepRecord
from runtime.sampling.run import Run
from tests.conditioned import config_of, denoised, denoised_on, write_image, write_vace
from tests.ranks import run_ranks

Ask = Callable[..., VideoRequest]
SIZE = {"width": 64, "height": 48, "frames": 9, "steps": 5, "seed": 3, "spectrum": "off"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vace(tmp_path_factory.mktemp("vace"))


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_image(tmp_path_factory.mktemp("image") / "start.png")
    Image.open(path).resize((64, 48)).save(path)
    return path


@pytest.fixture(scope="module")
def own(config: Config, folder: Path) -> Config:
    return config_of(config, folder)


@pytest.fixture(scope="module")
def vace(own: Config) -> Engine:
    return Engine(own)


@pytest.fixture(scope="module")
def ask(own: Config, image: Path) -> Ask:
    def make(*, seen: bool = True, **fields: object) -> VideoRequest:
        return own.request("a red circle", **{**SIZE, "image": str(image) if seen else None, **fields})

    return make


def generate(engine: Engine, request: VideoRequest, **more: object) -> Frames:
    sink = FrameBuffer()
    engine.generate(request, [sink], **more)
    return sink.frames


@pytest.mark.parametrize(("seen", "guidance"), [(False, 5.0), (True, 5.0), (True, 1.0)])
def test_one_window_is_the_pipelines_to_the_bit(
    vace: Engine, folder: Path, image: Path, ask: Ask, seen: bool, guidance: float
) -> None:
    pipeline = WanVACEPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    known: dict[str, object] = {}
    if seen:  # as the pipeline's documentation does it
        gray, white = Image.new("RGB", (64, 48), (128, 128, 128)), Image.new("L", (64, 48), 255)
        known = {
            "video": [Image.open(image), *[gray] * 8],
            "mask": [Image.new("L", (64, 48), 0), *[white] * 8],
        }
    request = ask(seen=seen, guidance=guidance)
    theirs = pipeline(
        **known, prompt=request.prompt, negative_prompt=request.negative, height=48, width=64, num_frames=9,
        num_inference_steps=5, guidance_scale=guidance, output_type="np",
        generator=torch.Generator("cpu").manual_seed(request.seed),
    ).frames[0]  # fmt: skip
    assert np.array_equal(generate(vace, request), (theirs * 255).round().astype(np.uint8))


def test_the_image_counts_and_videos_of_one_request_share_it(vace: Engine, ask: Ask) -> None:
    text, first = generate(vace, ask(seen=False)), generate(vace, ask())
    assert not np.array_equal(text, first)
    sinks = [FrameBuffer(), FrameBuffer()]
    run = vace.prepare(vace.plan(ask(videos=2)))
    assert run.image is not None
    assert torch.equal(*run.image.latents_BCFHW.split(1))
    vace.generate(ask(videos=2), sinks)
    assert not np.array_equal(sinks[0].frames, sinks[1].frames)


def test_each_window_goes_on_from_the_latents_of_the_one_before(vace: Engine, ask: Ask) -> None:
    long = ask(frames=21)
    windows = vace.plan(long).windows
    assert windows.starts == (0, 2, 3) and windows.length == 3
    run = vace.prepare(vace.plan(long))
    noise = run.noise_BCFHW
    done = [by_hand(vace, run, noise[:, :, 0:3], None)]
    done.append(by_hand(vace, run, noise[:, :, 2:5], done[0][:, :, 2:])[:, :, 1:])
    done.append(by_hand(vace, run, noise[:, :, 3:6], done[1])[:, :, 2:])
    assert torch.equal(denoised(vace, long), torch.cat(done, dim=2))


@torch.no_grad()
def by_hand(engine: Engine, run: Run, noise: torch.Tensor, tail: torch.Tensor | None) -> torch.Tensor:
    """One window through diffusers' sampler and the transformer itself."""
    assert run.image is not None
    plan, latents, control = run.plan, noise.clone(), run.image.latents_BCFHW.clone()
    assert control.shape[1] == 96
    if tail is not None:
        control[:, :16, : tail.shape[2]] = tail
        control[:, 32:, : tail.shape[2]] = 0
    sampler, text = plan.fresh_sampler(), engine.loaded.text.encode(plan.request)
    transformer = engine.loaded.experts[0].module
    for timestep in sampler.timesteps:
        cond, uncond = (
            transformer(latents, timestep.expand(1), embedding, control_hidden_states=control).sample
            for embedding in (text.prompts[0], text.negative)
        )
        velocity = uncond + plan.request.guidance * (cond - uncond)
        latents = sampler.step(velocity, timestep, latents, return_dict=False)[0]
    return latents


def test_long_videos_from_text_are_blended_and_from_an_image_extended(vace: Engine, ask: Ask) -> None:
    for seen, segments in ((False, 1), (True, 3)):
        plan = vace.plan(ask(seen=seen, frames=21))
        assert (len(plan.windows), plan.segments) == (3, segments)
        assert generate(vace, plan.request).shape == (21, 48, 64, 3)


@pytest.mark.parametrize("seen", [False, True])
def test_an_interrupted_video_goes_on_in_the_same_bits(
    vace: Engine, ask: Ask, tmp_path: Path, seen: bool
) -> None:
    request = ask(seen=seen, frames=17, spectrum="paper", steps=8)
    expected = generate(vace, request)

    def stop(record: StepRecord) -> None:
        if record.index == 3:
            vace.command(Command.STOP)

    with pytest.raises(CancelledError):
        generate(vace, request, on_step=stop, checkpoints=Checkpoints(tmp_path / "kept", every=2))
    kept = Checkpoints(tmp_path / "kept", every=2, resume=True)
    assert np.array_equal(generate(vace, request, checkpoints=kept), expected)


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("degrees", "memory"),
    [
        (Degrees(cfg=2), Memory()),
        (Degrees(ulysses=2), Memory(transformer="shard")),
        (Degrees(ring=2), Memory(transformer="offload")),
    ],
    ids=["cfg", "ulysses-sharded", "ring-offloaded"],
)
def test_many_ranks_make_what_one_does(
    vace: Engine, own: Config, ask: Ask, degrees: Degrees, memory: Memory
) -> None:
    request = ask(frames=17, spectrum="paper")
    alone = denoised(vace, request)
    config = own.model_copy(update={"memory": memory})
    first, second = run_ranks(2, denoised_on, config, request, degrees)
    assert torch.equal(first, second)
    assert (first - alone).norm() <= 1e-5 * alone.norm()


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("WanPipeline", "it is a WanPipeline, but its transformer is a WanVACETransformer3DModel"),
        (
            "WanImageToVideoPipeline",
            "it is a WanImageToVideoPipeline, but its transformer is a WanVACETransformer3DModel",
        ),
    ],
)
def test_a_pipeline_that_is_not_the_transformers_is_refused(
    own: Config, tmp_path: Path, kind: str, said: str
) -> None:
    folder = write_vace(tmp_path / "other")
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("WanVACEPipeline", kind))
    with pytest.raises(BadRequestError, match=said):
        find_model(own.model_copy(update={"model": str(folder)}))
