"""The engine against its peer: forecasting off is diffusers' WanPipeline, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanPipeline

from runtime.configs import EMBEDDED_MODELS, Config, Scheduler
from runtime.engine import Engine
from runtime.errors import BadRequestError
from runtime.request import VideoRequest
from runtime.video import FrameBuffer, Frames
from spectrum import StepKind

Make = Callable[..., VideoRequest]


def generate(engine: Engine, request: VideoRequest) -> list[Frames]:
    sinks = [FrameBuffer() for _ in range(request.videos)]
    engine.generate(request, sinks)
    return [sink.frames for sink in sinks]


@pytest.fixture(scope="module")
def peer() -> WanPipeline:
    """wan-tiny through diffusers alone, in float32."""
    pipeline = WanPipeline.from_pretrained(EMBEDDED_MODELS / "wan-tiny", dtype=torch.float32)
    pipeline.text_encoder.float()  # transformers keeps the file's float16
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def peer_frames(peer: WanPipeline, request: VideoRequest) -> list[Frames]:
    frames = peer(
        prompt=request.prompt,
        negative_prompt=request.negative,
        width=request.width,
        height=request.height,
        num_frames=request.frames,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance,
        num_videos_per_prompt=request.videos,
        max_sequence_length=request.max_sequence_length,
        generator=torch.Generator().manual_seed(request.seed),
    ).frames
    return [np.rint(video * np.float32(255)).astype(np.uint8) for video in frames]


@pytest.mark.parametrize("videos", [1, 2])
@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_forecasting_off_is_the_pipeline_to_the_bit(
    engine: Engine, peer: WanPipeline, small: Make, videos: int, guidance: float
) -> None:
    request = small(videos=videos, guidance=guidance, negative="a blue square", spectrum="off")
    for ours, theirs in zip(generate(engine, request), peer_frames(peer, request), strict=True):
        assert ours.shape == (5, 48, 64, 3)
        assert np.array_equal(ours, theirs)


def test_the_whole_default_clip_is_the_pipelines(engine: Engine, peer: WanPipeline, config: Config) -> None:
    request = config.request("a green square growing on a white background", seed=3, steps=4, spectrum="off")
    assert np.array_equal(generate(engine, request)[0], peer_frames(peer, request)[0])


@pytest.mark.parametrize("kind", ["unipc", "euler", "dpm++"])
def test_every_sampler_is_the_pipelines_to_the_bit(
    engine: Engine, peer: WanPipeline, small: Make, config: Config, kind: str
) -> None:
    choice = Scheduler(kind=kind, shift=5.0)  # type: ignore[arg-type]
    other = Engine(config.model_copy(update={"scheduler": choice}))
    pipeline = WanPipeline(**{**peer.components, "scheduler": other._pipeline.scheduler})
    pipeline.set_progress_bar_config(disable=True)
    request = small(spectrum="off")
    frames = generate(other, request)[0]
    assert np.array_equal(frames, peer_frames(pipeline, request)[0])
    assert not np.array_equal(frames, generate(engine, request)[0])


def test_bfloat16_is_the_pipelines_to_the_bit(small: Make, config: Config) -> None:
    dtypes = config.dtype.model_copy(update={"transformer": "bfloat16", "text_encoder": "bfloat16"})
    engine = Engine(config.model_copy(update={"dtype": dtypes}))
    request = small(spectrum="off")
    engine._pipeline.set_progress_bar_config(disable=True)
    assert np.array_equal(generate(engine, request)[0], peer_frames(engine._pipeline, request)[0])


def test_a_seed_means_one_video_whatever_ran_before(engine: Engine, small: Make) -> None:
    first = generate(engine, small(spectrum="paper"))[0]
    generate(engine, small(seed=8, spectrum="paper"))
    assert np.array_equal(generate(engine, small(spectrum="paper"))[0], first)
    assert not np.array_equal(generate(engine, small(seed=8, spectrum="paper"))[0], first)


def test_skipped_steps_change_little_and_are_recorded(engine: Engine, small: Make) -> None:
    full, fast = (
        engine.generate(small(spectrum=name, steps=20), [FrameBuffer()]) for name in ("off", "paper")
    )
    assert [len(full.computed), full.forecaster_bytes, full.features_kept] == [20, 0, 0]
    assert fast.computed == [0, 1, 2, 3, 4, 6, 8, 11, 15]
    assert [r.index for r in fast.steps] == list(range(20))
    assert fast.digest != full.digest
    tokens, channels = 2 * 3 * 4, 192
    assert fast.forecaster_bytes == 2 * 9 * tokens * channels * 4
    known = [r for r in fast.steps if r.error is not None]
    assert [r.index for r in known] == fast.computed[1:]
    assert all(r.kind is StepKind.COMPUTE and 0 < (r.error or 0) < 1 for r in known)


def test_frames_are_digested(engine: Engine, small: Make) -> None:
    sinks = [FrameBuffer(), FrameBuffer()]
    generation = engine.generate(small(videos=2, spectrum="paper"), sinks)
    again = engine.generate(small(videos=2, spectrum="paper"), [FrameBuffer(), FrameBuffer()])
    assert generation.frames_sha256 == again.frames_sha256
    assert len(set(generation.frames_sha256)) == 2


def test_an_interrupted_generation_does_not_harm_the_next(engine: Engine, small: Make) -> None:
    request = small(spectrum="paper")
    expected = generate(engine, request)[0]

    class Full:
        def write(self, frames_THW3: Frames) -> None:
            raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        engine.generate(request, [Full()])

    def cancel(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(request, [FrameBuffer()], cancel)
    assert np.array_equal(generate(engine, request)[0], expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("preset", ["off", "paper"])
def test_a_gpu_makes_the_video_of_the_cpu(engine: Engine, small: Make, config: Config, preset: str) -> None:
    on_gpu = Engine(config.model_copy(update={"device": "cuda"}))
    on_cpu = Engine(config.model_copy(update={"device": "cpu"}))
    request = small(spectrum=preset, steps=12)
    ours, theirs = (generate(one, request)[0].astype(float) for one in (on_gpu, on_cpu))
    assert np.mean((ours - theirs) ** 2) < 4.0  # PSNR above 42 dB


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("frames", 4097, "positions for 1024 tokens along each axis, and this would be 1025"),
        ("width", 16 * 1025, "this would be 1025"),
        ("height", 72, "needs a multiple of 16"),
    ],
)
def test_a_request_the_model_cannot_serve_is_refused(
    engine: Engine, small: Make, field: str, value: int, said: str
) -> None:
    beyond = small().model_copy(update={field: value})  # other models have other bounds than a request knows
    with pytest.raises(BadRequestError, match=f"{field}: {value} given; wan-tiny .*{said}"):
        engine.plan(beyond)


def test_an_explicit_schedule_beyond_the_steps_is_refused(
    engine: Engine, small: Make, tmp_path: Path
) -> None:
    path = tmp_path / "late.yaml"
    path.write_text("schedule: {kind: explicit, computed: [0, 6]}\n")
    with pytest.raises(BadRequestError, match="beyond the last of 6 steps"):
        engine.plan(small(spectrum=str(path)))
