"""Previews of generations: they show what is being made, and change nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from runtime.checkpoint.folder import Checkpoints
from runtime.engine import Engine
from runtime.media.mp4 import FrameBuffer, Frames
from runtime.media.preview import MOST_FRAMES
from runtime.models.colours import LatentColours, areas
from runtime.parallel.ranks import Ranks
from runtime.profile import ModelProfile
from runtime.request.config import Config, Window, load_config
from runtime.request.video_request import VideoRequest
from runtime.sampling.denoise import StepRecord
from runtime.sampling.estimate import Estimate
from runtime.sampling.result import Result
from tests.conditioned import config_of, write_i2v, write_image
from tests.family import toy_config, write_toy
from tests.ranks import WarmRanks

Make = Callable[..., VideoRequest]
pytestmark = pytest.mark.usefixtures("cached")


class Every:
    """Takes every preview that is offered, unlike `Previews`."""

    due = True

    def __init__(self) -> None:
        self.shown: list[tuple[Frames, float]] = []

    def show(self, frames_BTHW3: Frames, seconds: float) -> None:
        self.shown.append((frames_BTHW3, seconds))

    @property
    def last(self) -> Frames:
        return self.shown[-1][0]


def generate(
    engine: Engine, request: VideoRequest, previews: Every | None = None, **more: object
) -> tuple[Frames, Result]:
    sinks = [FrameBuffer() for _ in range(request.videos if engine.ranks.is_leader else 0)]
    with engine.previewed(previews):
        result = engine.generate(request, sinks, **more)  # type: ignore[arg-type]
    return np.stack([sink.frames for sink in sinks]) if sinks else np.zeros(0, np.uint8), result


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((one.astype(float) - other.astype(float)) ** 2)))


def true_colours(video_BTHW3: Frames, shown_BFHW3: Frames) -> np.ndarray:
    """What a preview should show of these frames."""
    return areas(torch.from_numpy(video_BTHW3).float(), shown_BFHW3.shape[1:4]).numpy()


@pytest.mark.parametrize("kind", ["unipc", "euler", "dpm++"])
def test_the_clean_estimate_of_a_straight_way_is_its_end(config: Config, kind: str) -> None:
    """With the one velocity from noise to a clean sample, every estimate is that sample, but for
    timesteps that are rounded to whole numbers."""
    settings = config.model_copy(update={"scheduler": config.scheduler.model_copy(update={"kind": kind})})
    numbers = torch.Generator().manual_seed(0)
    sampler = ModelProfile(settings).fresh_sampler(settings.request("a", steps=6), torch.device("cpu"))
    noise, clean = (torch.randn(1, 16, 3, 4, 4, generator=numbers) for _ in range(2))
    latents = noise
    for timestep in sampler.timesteps:
        estimate = Estimate(latents, noise - clean, float(timestep) / 1000)
        torch.testing.assert_close(estimate.clean(), clean, atol=0.01, rtol=0)
        torch.testing.assert_close(estimate.clean(2), clean[:, :, ::2], atol=0.01, rtol=0)
        latents = sampler.step(noise - clean, timestep, latents, return_dict=False)[0]


@pytest.mark.parametrize("spectrum", ["off", "paper"])
def test_the_bits_are_the_same(engine: Engine, small: Make, spectrum: str) -> None:
    request, previews = small(spectrum=spectrum, videos=2), Every()
    _, plain = generate(engine, request)
    _, shown = generate(engine, request, previews)
    assert shown.frames_sha256 == plain.frames_sha256
    assert plain.preview_seconds is None
    assert len(previews.shown) == len(shown.preview_seconds or []) == shown.nfe  # computed steps alone
    assert {frames.shape for frames, _ in previews.shown} == {(2, 2, 6, 8, 3)}
    assert {frames.dtype for frames, _ in previews.shown} == {np.dtype(np.uint8)}
    seconds = previews.shown[0][1]
    assert seconds * previews.last.shape[1] == pytest.approx(request.frames / engine.config.fps)


def test_it_comes_ever_closer_to_the_video(engine: Engine, small: Make) -> None:
    request, previews = small(width=96, height=96, frames=9, steps=12, spectrum="off"), Every()
    video, _ = generate(engine, request, previews)
    true = true_colours(video, previews.last)
    mean = np.broadcast_to(true.mean((0, 1, 2, 3)), true.shape)
    first, last = (psnr(frames, true) for frames, _ in (previews.shown[0], previews.shown[-1]))
    assert last > psnr(mean, true) + 2
    assert last > psnr(np.full_like(true, 127), true) + 6
    assert last > first


def test_a_job_does_not_fail_for_want_of_memory_for_its_preview(
    engine: Engine, small: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find() -> LatentColours:
        raise torch.OutOfMemoryError("CUDA out of memory")

    _, plain = generate(engine, small())
    monkeypatch.setattr(engine, "loaded", replace(engine.loaded, colours=find))
    previews = Every()
    _, result = generate(engine, small(), previews)
    assert result.frames_sha256 == plain.frames_sha256 and not previews.shown
    assert result.warnings == ["preview: none is shown, as memory does not suffice to fit its colours"]


def test_windows_are_shown_as_one_video(engine: Engine, small: Make) -> None:
    windowed = Engine(engine.config.model_copy(update={"window": Window(frames=9, overlap=4)}))
    request, previews = small(frames=25, spectrum="off"), Every()
    _, plain = generate(windowed, request)
    video, shown = generate(windowed, request, previews)
    assert len(shown.plan.windows) > 1 and shown.frames_sha256 == plain.frames_sha256
    assert previews.last.shape == (1, 7, 6, 8, 3)
    true = true_colours(video, previews.last)
    assert psnr(previews.last, true) > psnr(np.full_like(true, 127), true) + 3


def test_a_long_video_is_shown_in_a_few_frames(engine: Engine, small: Make) -> None:
    """What is sent to the host and encoded does not grow with the length."""
    windowed = Engine(engine.config.model_copy(update={"window": Window(frames=9, overlap=4)}))
    previews = Every()
    latent_frames = MOST_FRAMES + 2
    generate(windowed, small(frames=4 * latent_frames - 3, steps=1, spectrum="off"), previews)
    frames, seconds = previews.shown[0]
    assert frames.shape[1] == latent_frames / 2 <= MOST_FRAMES
    assert seconds * frames.shape[1] == pytest.approx((4 * latent_frames - 3) / windowed.config.fps)


def test_the_segment_at_work_is_shown(config: Config, tmp_path: Path) -> None:
    engine = Engine(config_of(config, write_i2v(tmp_path / "model")))
    image = str(write_image(tmp_path / "start.png"))
    request = engine.config.request(
        "a", image=image, width=96, height=64, frames=17, steps=2, seed=1, spectrum="off"
    )
    previews = Every()
    _, plain = generate(engine, request)
    _, shown = generate(engine, request, previews)
    segments = engine.plan(request).segments
    assert segments > 1 and shown.frames_sha256 == plain.frames_sha256
    assert [frames.shape for frames, _ in previews.shown] == [(1, 3, 8, 12, 3)] * 2 * segments


def test_a_resumed_generation_goes_on_showing(engine: Engine, small: Make, tmp_path: Path) -> None:
    request, whole = small(spectrum="off"), Every()
    generate(engine, request, whole)

    class InterruptedHereError(Exception):
        pass

    def after(record: StepRecord) -> None:
        if record.index == 2:
            raise InterruptedHereError

    checkpoints = Checkpoints(tmp_path, every=1)
    before = Every()
    with pytest.raises(InterruptedHereError):
        generate(engine, request, before, on_step=after, checkpoints=checkpoints)
    later = Every()
    _, resumed = generate(engine, request, later, checkpoints=Checkpoints(tmp_path, every=1, resume=True))
    assert resumed.resumed_at == 3
    told = [frames.tobytes() for frames, _ in (*before.shown, *later.shown)]
    assert told == [frames.tobytes() for frames, _ in whole.shown]


def test_a_model_whose_colours_are_unknown_says_so(tmp_path: Path) -> None:
    engine = Engine(toy_config(write_toy(tmp_path)))
    previews = Every()
    _, shown = generate(engine, engine.config.request("a", seed=1), previews)
    assert previews.shown == [] and shown.preview_seconds == []
    assert any(warning.startswith("preview: none is shown") for warning in shown.warnings)


def previewed(ranks: Ranks, request: VideoRequest, wanted: bool) -> tuple[list[str], list[bytes], int]:
    """Frames' digests and the previews that this rank made."""
    engine, previews = Engine(load_config("wan-tiny"), ranks), Every()
    _, result = generate(engine, request, previews if wanted else None)
    return result.frames_sha256, [frames.tobytes() for frames, _ in previews.shown], result.nfe


def test_the_first_of_two_ranks_shows_and_nothing_changes(small: Make, warm: WarmRanks) -> None:
    request = small(spectrum="paper")
    plain = warm.run(2, previewed, request, False)
    shown = warm.run(2, previewed, request, True)
    assert [one[0] for one in shown] == [one[0] for one in plain]
    assert len(shown[0][1]) == shown[0][2] > 0
    assert shown[1][1] == []
