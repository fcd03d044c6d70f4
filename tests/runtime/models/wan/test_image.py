"""Videos from an image, and how they are extended: each window goes on from the latents of the one before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline
from PIL import Image

from runtime.checkpoint.folder import Checkpoints
from runtime.engine import Engine
from runtime.errors import BadRequestError, CancelledError
from runtime.jobs.run import run_job
from runtime.media.mp4 import FrameBuffer, Frames
from runtime.parallel.topology import Degrees
from runtime.request.config import Config
from runtime.request.outputs import Outputs
from runtime.request.video_request import VideoRequest
from runtime.sampling.commands import Command
from runtime.sampling.denoise import StepRecord
from runtime.sampling.result import Result
from runtime.sampling.run import Run
from tests.conditioned import config_of, denoised, denoised_on, write_i2v, write_image
from tests.jobs import job_of
from tests.ranks import run_ranks

Ask = Callable[..., VideoRequest]
SIZE = {"width": 64, "height": 48, "steps": 5, "seed": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_i2v(tmp_path_factory.mktemp("i2v"))


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_image(tmp_path_factory.mktemp("image") / "start.png")


@pytest.fixture(scope="module")
def own(config: Config, folder: Path) -> Config:
    return config_of(config, folder)


@pytest.fixture(scope="module")
def i2v(own: Config) -> Engine:
    return Engine(own)


@pytest.fixture(scope="module")
def ask(own: Config, image: Path) -> Ask:
    def make(**fields: object) -> VideoRequest:
        return own.request("a red circle", **{**SIZE, "image": str(image), "spectrum": "off", **fields})

    return make


def generate(engine: Engine, request: VideoRequest) -> tuple[Frames, Result]:
    sink = FrameBuffer()
    result = engine.generate(request, [sink])
    return sink.frames, result


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_one_window_is_the_pipelines_to_the_bit(
    i2v: Engine, folder: Path, image: Path, ask: Ask, guidance: float
) -> None:
    pipeline = WanImageToVideoPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    request = ask(frames=9, guidance=guidance)
    theirs = pipeline(
        image=Image.open(image), prompt=request.prompt, negative_prompt=request.negative, height=48, width=64,
        num_frames=9, num_inference_steps=5, guidance_scale=guidance, output_type="np",
        generator=torch.Generator("cpu").manual_seed(request.seed),
    ).frames[0]  # fmt: skip
    frames, result = generate(i2v, request)
    assert np.array_equal(frames, (theirs * 255).round().astype(np.uint8))
    assert result.computed["cond"] == [0, 1, 2, 3, 4]


def test_the_image_and_the_seed_are_what_a_video_is_a_function_of(
    i2v: Engine, ask: Ask, tmp_path: Path
) -> None:
    first, again = (generate(i2v, ask(frames=9))[0] for _ in range(2))
    assert np.array_equal(first, again)
    other = generate(i2v, ask(frames=9, image=str(write_image(tmp_path / "other.png", seed=1))))[0]
    assert not np.array_equal(first, other)


def test_each_window_goes_on_from_the_latents_of_the_one_before(i2v: Engine, ask: Ask) -> None:
    long = ask(frames=21)
    windows = i2v.plan(long).windows
    assert windows.starts == (0, 2, 3) and windows.length == 3  # the last overlaps more
    run = i2v.prepare(i2v.plan(long))
    video = denoised(i2v, long)
    assert video.shape[2] == windows.total

    # By hand: the first window alone, then the second with one known latent frame, and the third with two.
    noise = run.noise_BCFHW
    done = [denoised_of(i2v, run, noise[:, :, 0:3], None)]
    done.append(denoised_of(i2v, run, noise[:, :, 2:5], done[0][:, :, 2:])[:, :, 1:])
    done.append(denoised_of(i2v, run, noise[:, :, 3:6], done[1])[:, :, 2:])
    assert torch.equal(video, torch.cat(done, dim=2))


def denoised_of(engine: Engine, run: Run, noise: torch.Tensor, tail: torch.Tensor | None) -> torch.Tensor:
    """One window through diffusers' sampler and the transformer itself."""
    assert run.image is not None
    plan, latents, condition = run.plan, noise.clone(), run.image.latents_BCFHW.clone()
    if tail is not None:
        condition[:, :4, : tail.shape[2]] = 1
        condition[:, 4:, : tail.shape[2]] = tail
    sampler, transformer = plan.fresh_sampler(), engine.loaded.experts[0].module
    text = engine.loaded.text.encode(plan.request)
    with torch.no_grad():
        for timestep in sampler.timesteps:
            outputs = [
                transformer(
                    torch.cat([latents, condition], 1),
                    timestep.expand(1),
                    embedding,
                    run.image.tokens_BIE,
                ).sample
                for embedding in (text.prompts[0], text.negative)
            ]
            velocity = outputs[1] + plan.request.guidance * (outputs[0] - outputs[1])
            latents = sampler.step(velocity, timestep, latents, return_dict=False)[0]
    return latents


def test_an_extended_video_is_counted_through_and_forecasts_in_every_window(i2v: Engine, ask: Ask) -> None:
    preset = ask(frames=21, spectrum="paper", steps=8)
    shown: list[StepRecord] = []
    result = i2v.generate(preset, [FrameBuffer()], shown.append)
    assert [step.index for step in shown] == list(range(24)) == [step.index for step in result.steps]
    assert len(result.plan.windows) == 3
    assert result.computed["cond"] == [*range(5), 6, *range(8, 13), 14, *range(16, 21), 22]
    assert len(i2v.plan(preset).kinds) == 24
    assert result.nfe == 18
    assert {step % 8 for step in result.errors} == {1, 2, 3, 4, 6}


@pytest.mark.parametrize("step", [2, 9])
def test_an_interrupted_extension_goes_on_in_the_same_bits(
    i2v: Engine, ask: Ask, tmp_path: Path, step: int
) -> None:
    request = ask(frames=21, spectrum="paper", steps=8)
    expected, undisturbed = generate(i2v, request)

    def stop(record: StepRecord) -> None:
        if record.index == step:
            i2v.command(Command.STOP)

    kept = Checkpoints(tmp_path / "kept", every=4)
    with pytest.raises(CancelledError):
        i2v.generate(request, [FrameBuffer()], stop, kept)
    sink = FrameBuffer()
    resumed = i2v.generate(request, [sink], checkpoints=Checkpoints(tmp_path / "kept", every=4, resume=True))
    assert resumed.resumed_at == step + 3  # agreed in the step after, it ends the one after that
    assert np.array_equal(sink.frames, expected)
    assert (resumed.computed, resumed.errors) == (undisturbed.computed, undisturbed.errors)


def test_a_stop_asked_for_in_the_last_step_of_a_window_ends_the_next(i2v: Engine, ask: Ask) -> None:
    shown: list[int] = []

    def stop(record: StepRecord) -> None:
        shown.append(record.index)
        if record.index == 4:
            i2v.command(Command.STOP)

    with pytest.raises(CancelledError):
        i2v.generate(ask(frames=21), [FrameBuffer()], stop)
    assert 5 <= len(shown) <= 7


@pytest.mark.timeout(120)
@pytest.mark.parametrize("degrees", [Degrees(cfg=2), Degrees(ulysses=2), Degrees(ring=2)], ids=str)
def test_many_ranks_extend_as_one_does(i2v: Engine, own: Config, ask: Ask, degrees: Degrees) -> None:
    request = ask(frames=17, spectrum="paper")
    alone = denoised(i2v, request)
    first, second = run_ranks(2, denoised_on, own, request, degrees)
    assert torch.equal(first, second)
    assert (first - alone).norm() <= 1e-5 * alone.norm()


def test_what_does_not_fit_is_refused(i2v: Engine, engine: Engine, ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "no.png").write_bytes(b"no image")
    for refuser, request, said in (
        (i2v, ask(image=None), "image: missing"),
        (i2v, ask(max_sequence_length=64), "max_sequence_length: 64 given"),
        (engine, ask(), "makes videos from text alone"),
        (i2v, ask(image=str(tmp_path / "no.png")), "it is not an image"),
        (i2v, ask(image=str(tmp_path / "none.png")), "cannot be read"),
    ):
        with pytest.raises(BadRequestError, match=said):
            run_job(refuser, job_of(refuser, request, Outputs.named(tmp_path / "a.mp4")))
    assert not list(tmp_path.glob("a.*"))
