"""Videos beyond the model's window: windows that overlap, denoised together."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from runtime.checkpoint.folder import Checkpoints
from runtime.engine import Engine
from runtime.errors import BadRequestError
from runtime.media.mp4 import FrameBuffer, Frames
from runtime.parallel.ranks import Ranks
from runtime.parallel.topology import Degrees
from runtime.request.config import Config, Window, load_config
from runtime.request.video_request import VideoRequest
from runtime.request.windows import Windows
from runtime.sampling.denoise import StepRecord
from runtime.sampling.result import Result
from tests.ranks import run_ranks

Make = Callable[..., VideoRequest]
PROMPT = "a red circle moving left on a black background"
SMALL = {"width": 64, "height": 48, "steps": 6, "max_sequence_length": 32, "seed": 7, "frames": 25}
WINDOW = Window(frames=9, overlap=4)


def generate(engine: Engine, request: VideoRequest) -> tuple[Frames, Result]:
    sink = FrameBuffer()
    result = engine.generate(request, [sink])
    return sink.frames, result


@pytest.fixture(scope="module")
def windowed(config: Config) -> Engine:
    return Engine(config.model_copy(update={"window": WINDOW}))


@given(total=st.integers(1, 200), length=st.integers(2, 30), data=st.data())
def test_windows_cover_everything_and_their_weights_add_up(
    total: int, length: int, data: st.DataObject
) -> None:
    overlap = data.draw(st.integers(1, length - 1))
    windows = Windows.over(total, length, overlap)
    starts, sums = windows.starts, torch.zeros(total)
    for number, weights in enumerate(windows.weights()):
        assert weights.shape == (windows.length,)
        assert weights.min() > 0
        sums[windows.slice(number)] += weights
    assert torch.allclose(sums, torch.ones(total))
    assert starts[0] == 0 and starts[-1] + windows.length == total
    assert all(b - a <= length - overlap for a, b in pairwise(starts))
    assert len(windows) == 1 or total - length > (len(windows) - 2) * (length - overlap)


@pytest.mark.parametrize("overlap", [0, 5])
def test_windows_must_overlap_in_part(overlap: int) -> None:
    with pytest.raises(ValueError, match="overlap in 1 to 4"):
        Windows.over(20, 5, overlap)


@pytest.mark.parametrize("spectrum", ["off", "paper"])
def test_a_video_that_fits_one_window_is_the_plain_one(
    engine: Engine, windowed: Engine, small: Make, spectrum: str
) -> None:
    request = small(frames=9, spectrum=spectrum)
    plain = Engine(engine.config.model_copy(update={"window": None}))
    assert np.array_equal(generate(windowed, request)[0], generate(plain, request)[0])


def test_every_window_is_evaluated_as_a_video_of_its_own(windowed: Engine, small: Make) -> None:
    """One Euler-like look at a single step: blended velocities are the weighted windows'."""
    run = windowed.prepare(windowed.plan(small(frames=17, spectrum="off")))
    windows = run.plan.windows
    assert windows == Windows(5, 3, (0, 2))
    timestep, latents = torch.tensor([700.0]), run.noise_BCFHW
    kinds = {"cond": "compute", "uncond": "compute"}
    with torch.no_grad():
        velocity = run.open_stream().advance(0, kinds, latents, timestep).velocity_BCFHW  # type: ignore[arg-type]
        time = run.network.adapter.time(timestep)  # type: ignore[attr-defined]
        first, second = (
            run.network.compute(latents[:, :, part].contiguous(), time).velocity_BCFHW  # type: ignore[attr-defined]
            for part in (slice(0, 3), slice(2, 5))
        )
    assert torch.equal(velocity[:, :, :2], first[:, :, :2])
    assert torch.equal(velocity[:, :, 3:], second[:, :, 1:])
    torch.testing.assert_close(velocity[:, :, 2], (first[:, :, 2] + second[:, :, 0]) / 2)


def test_without_a_window_the_model_must_see_all_of_it(windowed: Engine, config: Config, small: Make) -> None:
    beyond = small().model_copy(update={"frames": 4097})
    assert len(windowed.plan(beyond).windows) == 512
    whole = Engine(config.model_copy(update={"window": None}))
    with pytest.raises(BadRequestError, match=r"frames: 4097 given; wan-tiny .*this needs 1025"):
        whole.plan(beyond)


@pytest.mark.parametrize("stream", ["feature", "guided"])
def test_a_long_video_goes_on_in_the_same_bits(
    windowed: Engine, small: Make, tmp_path: Path, stream: str
) -> None:
    preset = tmp_path / "mine.yaml"
    preset.write_text(f"stream: {stream}\nschedule: {{kind: explicit, computed: [0, 1, 3]}}\n")
    request = small(frames=25, spectrum=str(preset))
    expected, undisturbed = generate(windowed, request)

    class InterruptedHereError(Exception):
        pass

    def after(record: StepRecord) -> None:
        if record.index == 4:
            raise InterruptedHereError

    with pytest.raises(InterruptedHereError):
        windowed.generate(request, [FrameBuffer()], after, Checkpoints(tmp_path / "kept", every=1))
    sink = FrameBuffer()
    resumed = windowed.generate(
        request, [sink], checkpoints=Checkpoints(tmp_path / "kept", every=1, resume=True)
    )
    assert resumed.resumed_at in (2, 4)  # the newest that was whole: they are written in the background
    assert np.array_equal(sink.frames, expected)
    assert resumed.errors == undisturbed.errors
    assert resumed.digests == undisturbed.digests
    assert len(resumed.plan.windows) == len(windowed.plan(request).windows) == 3


def on_ranks(ranks: Ranks, degrees: Degrees) -> Frames | None:
    config = load_config("wan-tiny").model_copy(update={"window": WINDOW})
    engine = Engine(config, ranks, degrees)
    sink = FrameBuffer()
    engine.generate(config.request(PROMPT, **SMALL, spectrum="paper"), [sink] if ranks.is_leader else [])
    return sink.frames if ranks.is_leader else None


@pytest.mark.timeout(120)
def test_many_ranks_make_the_long_video_of_one(windowed: Engine) -> None:
    expected, _ = generate(windowed, windowed.config.request(PROMPT, **SMALL, spectrum="paper"))
    for degrees in (Degrees(cfg=2), Degrees(ulysses=2)):
        frames = run_ranks(2, on_ranks, degrees)[0]
        assert np.abs(frames.astype(int) - expected).max() <= 1


OTHER = "a blue square moving in circles on a gray background"


@pytest.mark.parametrize("prompt", [PROMPT, pytest.param(OTHER, marks=pytest.mark.slow)])
def test_there_is_no_jump_where_windows_meet(engine: Engine, prompt: str) -> None:
    """Where windows begin and end, frames differ no more than 1.5 × what is usual.

    A latent frame is four frames, whose differences fall off within it, in short videos, too; so the
    unit of comparison is their mean.
    """
    request = engine.config.request(prompt, seed=3, frames=49, steps=8, spectrum="off")
    windows = engine.plan(request).windows
    assert windows.starts == (0, 3, 6, 8)
    frames, _ = generate(engine, request)
    jumps = np.abs(np.diff(frames.astype(float), axis=0)).mean(axis=(1, 2, 3)).reshape(-1, 4).mean(1)
    borders = {*windows.starts[1:], *(start + windows.length for start in windows.starts[:-1])}
    for border in borders:  # jumps[k] is from latent frame k to k + 1
        assert jumps[border - 1] <= 1.5 * np.median(jumps), border


@pytest.mark.parametrize(
    "settings", [{"frames": 16, "overlap": 4}, {"frames": 9, "overlap": 8}, {"frames": 9, "overlap": 3}]
)
def test_impossible_windows_are_refused(settings: dict[str, int], tmp_path: Path, config: Config) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json") | {"window": settings}))
    with pytest.raises(BadRequestError, match="window"):
        load_config(str(path))
