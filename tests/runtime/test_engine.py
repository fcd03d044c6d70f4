"""The engine against its peer: forecasting off is diffusers' WanPipeline, bit for bit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanPipeline

from runtime.engine import Engine
from runtime.errors import BadRequestError, CancelledError
from runtime.media.mp4 import FrameBuffer, Frames
from runtime.request.config import EMBEDDED_MODELS, Config
from runtime.request.memory import Memory
from runtime.request.sampler import SamplerConfig
from runtime.request.video_request import VideoRequest
from runtime.sampling.commands import Command
from runtime.sampling.denoise import StepRecord

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
    choice = SamplerConfig(kind=kind, shift=5.0)  # type: ignore[arg-type]
    other = Engine(config.model_copy(update={"scheduler": choice}))
    pipeline = WanPipeline(**{**peer.components, "scheduler": other.profile.sampler})
    pipeline.set_progress_bar_config(disable=True)
    request = small(spectrum="off")
    frames = generate(other, request)[0]
    assert np.array_equal(frames, peer_frames(pipeline, request)[0])
    assert not np.array_equal(frames, generate(engine, request)[0])


def test_bfloat16_is_the_pipelines_to_the_bit(small: Make, config: Config) -> None:
    dtypes = config.dtype.model_copy(update={"transformer": "bfloat16", "text_encoder": "bfloat16"})
    engine = Engine(config.model_copy(update={"dtype": dtypes}))
    kinds = {"text_encoder": torch.bfloat16, "transformer": torch.bfloat16, "vae": torch.float32}
    pipeline = WanPipeline.from_pretrained(EMBEDDED_MODELS / "wan-tiny", dtype=kinds)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.transformer.dtype == pipeline.text_encoder.dtype == torch.bfloat16
    request = small(spectrum="off")
    assert np.array_equal(generate(engine, request)[0], peer_frames(pipeline, request)[0])


def test_a_seed_means_one_video_whatever_ran_before(engine: Engine, small: Make) -> None:
    first = generate(engine, small(spectrum="paper"))[0]
    generate(engine, small(seed=8, spectrum="paper"))
    assert np.array_equal(generate(engine, small(spectrum="paper"))[0], first)
    assert not np.array_equal(generate(engine, small(seed=8, spectrum="paper"))[0], first)


def test_skipped_steps_change_little_and_are_recorded(engine: Engine, small: Make) -> None:
    full, fast = (
        engine.generate(small(spectrum=name, steps=20), [FrameBuffer()]) for name in ("off", "paper")
    )
    assert [len(full.computed["cond"]), full.forecaster_bytes, full.features_kept] == [20, 0, 0]
    assert fast.computed["cond"] == fast.computed["uncond"] == [0, 1, 2, 3, 4, 6, 8, 11, 15]
    assert [r.index for r in fast.steps] == list(range(20))
    assert fast.digests != full.digests
    tokens, channels = 2 * 3 * 4, 192
    assert fast.forecaster_bytes == 2 * 9 * tokens * channels * 4
    assert list(fast.errors) == fast.computed["cond"][1:]
    assert all(0 < error < 1 for error in fast.errors.values())
    assert {step.index: step.error for step in fast.steps if step.error is not None} == fast.errors


def test_frames_are_digested(engine: Engine, small: Make) -> None:
    sinks = [FrameBuffer(), FrameBuffer()]
    result = engine.generate(small(videos=2, spectrum="paper"), sinks)
    again = engine.generate(small(videos=2, spectrum="paper"), [FrameBuffer(), FrameBuffer()])
    assert result.frames_sha256 == again.frames_sha256
    assert len(set(result.frames_sha256)) == 2


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


def test_a_generation_can_be_told_to_end(engine: Engine, small: Make) -> None:
    assert not engine.command(Command.CANCEL)  # nothing runs

    def cancel(record: StepRecord) -> None:
        if record.index == 1:
            assert engine.command(Command.CANCEL)

    with pytest.raises(CancelledError, match="cancelled before step 3"):
        engine.generate(small(), [FrameBuffer()], cancel)
    assert not engine.command(Command.CANCEL)


def test_a_stop_while_frames_are_written_ends_what_comes_next(engine: Engine, small: Make) -> None:
    """The video that has had its last step is finished; within one job, no other is begun."""

    class Stopping(FrameBuffer):
        def write(self, frames_THW3: Frames) -> None:
            assert engine.command(Command.STOP)
            super().write(frames_THW3)

    assert not engine.command(Command.STOP)
    sink = Stopping()
    with engine.commanded():
        engine.generate(small(), [sink])
        assert sink.frames.shape[0] == small().frames
        with pytest.raises(CancelledError, match="stopped after step 1"):
            engine.generate(small(), [FrameBuffer()])
    assert not engine.command(Command.STOP)
    generate(engine, small(steps=2))


def test_nobody_is_told_that_a_failed_generation_will_stop(engine: Engine, small: Make) -> None:
    """Even while its traceback, and with it all that ran, is still there."""

    def fail(record: StepRecord) -> None:
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space") as caught:
        engine.generate(small(), [FrameBuffer()], fail)
    assert caught.tb is not None
    assert not engine.command(Command.STOP)


@pytest.mark.parametrize("policy", ["offload", "free"])
def test_where_idle_weights_and_histories_are_changes_no_bit(
    engine: Engine, small: Make, config: Config, policy: str
) -> None:
    rest = "offload" if policy == "offload" else "keep"
    memory = Memory(text_encoder=policy, vae=rest, history=rest)  # type: ignore[arg-type]
    other = Engine(config.model_copy(update={"memory": memory}))
    assert (other.loaded.text._encoder is None) == (policy == "free")  # type: ignore[attr-defined]
    expected = generate(engine, small())[0]
    for _ in range(2):
        assert np.array_equal(generate(other, small())[0], expected)


def test_compiled_blocks_change_little(engine: Engine, small: Make, config: Config) -> None:
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("compiling for the CPU needs a C++ compiler")
    other = Engine(config.model_copy(update={"compile": True}))
    ours, theirs = (generate(one, small(steps=2))[0].astype(float) for one in (other, engine))
    assert np.mean((ours - theirs) ** 2) < 0.5


def test_attention_by_name_is_reported_and_changes_little(
    engine: Engine, small: Make, config: Config
) -> None:
    other = Engine(config.model_copy(update={"attention": "math"}))
    sink = FrameBuffer()
    assert other.generate(small(), [sink]).plan.attention == "math"
    ours = engine.generate(small(), [FrameBuffer()])
    assert (ours.plan.attention, ours.kernel) == ("sdpa", "flash")
    assert np.mean((sink.frames.astype(float) - generate(engine, small())[0]) ** 2) < 0.5


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
        ("width", 16 * 1025, "positions for 1024 tokens along each axis, but this needs 1025"),
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


def test_words_beyond_the_text_encoders_length_are_said(engine: Engine) -> None:
    given = {"width": 64, "height": 48, "frames": 5, "steps": 1, "max_sequence_length": 32, "spectrum": "off"}
    long = engine.config.request("a red circle " * 20, negative="blurry " * 40, guidance=3.0, **given)
    warnings = engine.generate(long, [FrameBuffer()]).warnings
    assert [one.split(":")[0] for one in warnings] == ["prompt", "negative"]
    assert "max_sequence_length is 32; the part that is ignored begins with '" in warnings[0]
    assert engine.generate(engine.config.request("a dog", **given), [FrameBuffer()]).warnings == []
