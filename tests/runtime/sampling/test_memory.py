"""What plainly does not fit is refused; an allocation that fails is told with what to do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from runtime.engine import Engine
from runtime.errors import BadRequestError, JobFailedError
from runtime.media.mp4 import FrameBuffer
from runtime.request.video_request import VideoRequest
from runtime.sampling.memory import memory_of, shortage_explained

CPU = torch.device("cpu")


def test_a_request_that_no_memory_holds_is_refused_with_bytes(
    engine: Engine, small: Callable[..., VideoRequest]
) -> None:
    largest = small(width=8192, height=8192, frames=4001, videos=64)
    with pytest.raises(
        BadRequestError, match=r"size 8192x8192, 4001 frames, 64 videos: needs at least"
    ) as caught:
        engine.generate(largest, [FrameBuffer()] * 64)
    assert "GB for latents" in str(caught.value) and "\n" not in str(caught.value)
    engine.plan(small())


@pytest.mark.parametrize("allocate", [lambda: torch.empty(memory_of(CPU) * 1000), lambda: b"x" * 10**15])
def test_an_allocation_that_fails_fails_the_job(allocate: Callable[[], object]) -> None:
    with (
        pytest.raises(JobFailedError, match="size so: cpu ran out of memory") as caught,
        shortage_explained(CPU, "size so"),
    ):
        allocate()
    assert "reduce size, frames or videos" in str(caught.value)
    with pytest.raises(RuntimeError, match="size"), shortage_explained(CPU, "size so"):
        torch.ones(2) @ torch.ones(3)
