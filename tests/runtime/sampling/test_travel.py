"""Prompts that change along a video: every window has the text of its own place."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from runtime.engine import Engine
from runtime.errors import BadRequestError
from runtime.media.mp4 import FrameBuffer
from runtime.models.base import Embeddings
from runtime.request.config import Config, Window
from runtime.request.video_request import VideoRequest, Waypoint
from runtime.request.windows import Windows
from runtime.sampling.run import Run
from runtime.sampling.travel import window_embeddings
from spectrum import StepKind

Make = Callable[..., VideoRequest]
LATER = "a blue square moving left on a black background"
KINDS = {"cond": StepKind.COMPUTE, "uncond": StepKind.COMPUTE}


@pytest.fixture(scope="module")
def windowed(config: Config) -> Engine:
    return Engine(config.model_copy(update={"window": Window(frames=9, overlap=4)}))


def velocity(run: Run) -> torch.Tensor:
    with torch.no_grad():
        stream = run.open_stream()
        return stream.advance(0, KINDS, run.noise_BCFHW, torch.tensor([700.0])).velocity_BCFHW


def test_windows_lie_between_the_prompts_around_them(small: Make) -> None:
    request = small(frames=25, travel=[{"at": 0.5, "prompt": "b"}, {"at": 0.75, "prompt": "c"}])
    text = Embeddings([torch.full((1, 2, 3), float(value)) for value in (0, 10, 20)], torch.zeros(1, 2, 3))
    found = window_embeddings(request, Windows(17, 5, (0, 3, 6, 9, 12)), text)
    assert [float(of_window[0].mean()) for of_window in found] == [0, 5, 10, 20, 20]
    assert all(of_window[1] is text.negative for of_window in found)


def test_the_ends_of_the_video_have_the_first_and_the_last_prompt(windowed: Engine, small: Make) -> None:
    given = {"frames": 25, "spectrum": "off"}
    plain, later, travelling = (
        windowed.prepare(windowed.plan(small(**given).model_copy(update=changes)))
        for changes in ({}, {"prompt": LATER}, {"travel": (Waypoint(at=1.0, prompt=LATER),)})
    )
    assert len(travelling.networks) == 3
    first, last, mixed = velocity(plain), velocity(later), velocity(travelling)
    assert torch.equal(mixed[:, :, :2], first[:, :, :2])
    assert torch.equal(mixed[:, :, -2:], last[:, :, -2:])
    assert not torch.equal(mixed[:, :, 3], first[:, :, 3]) and not torch.equal(mixed[:, :, 3], last[:, :, 3])


def test_a_prompt_that_changes_to_itself_is_the_plain_video(windowed: Engine, small: Make) -> None:
    frames = []
    for travel in ((), (Waypoint(at=0.5, prompt=small().prompt),)):
        sink = FrameBuffer()
        windowed.generate(small(frames=25, spectrum="paper", travel=travel), [sink])
        frames.append(sink.frames)
    assert np.array_equal(*frames)


@pytest.mark.parametrize(
    ("frames", "travel", "said"),
    [
        (
            17,
            [{"at": 1, "prompt": "b"}],
            "travel: 1 later prompt given; the model takes one prompt for 17 frames",
        ),
        (
            33,
            [{"at": 0.5, "prompt": "b"}, {"at": 0.5, "prompt": "c"}],
            "travel: .* must be in ascending order",
        ),
        (33, [{"at": 0, "prompt": "b"}], r"travel\.0\.at: 0 given; .*greater than 0"),
        (33, [{"at": 1, "prompt": " "}], r"travel\.0\.prompt: ' ' given; must not be empty"),
    ],
)
def test_travel_that_makes_no_sense_is_refused(
    config: Config, frames: int, travel: list[dict[str, object]], said: str
) -> None:
    with pytest.raises(BadRequestError, match=said):
        config.request("a", frames=frames, travel=travel)
