"""Frames are written while later ones are decoded."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from runtime.engine import Engine
from runtime.errors import NotFiniteError
from runtime.media.mp4 import FrameBuffer, Frames
from runtime.sampling.decoding import write_frames
from runtime.sampling.result import Result

SHORT = 20.0  # seconds that a test waits for what should come at once


@pytest.fixture
def result(engine: Engine) -> Result:
    return Result(engine.plan(engine.config.request("a red circle", width=64, height=48, frames=5)))


def nothing(*, busy: bool) -> None:
    assert busy


def chunk(number: int) -> torch.Tensor:
    return torch.full((1, 4, 8, 8, 3), number / 255)


class _Slow(FrameBuffer):
    """A sink that finishes its first frames only when later ones have been decoded."""

    def __init__(self) -> None:
        super().__init__()
        self.decoded = threading.Event()

    def write(self, frames_THW3: Frames) -> None:
        assert self.decoded.wait(SHORT)
        super().write(frames_THW3)


def test_a_slow_file_does_not_hold_up_the_decoder(engine: Engine, result: Result) -> None:
    sink = _Slow()

    def chunks() -> Iterator[torch.Tensor]:
        for number in range(7):
            if number == 2:
                sink.decoded.set()
            yield chunk(number)

    write_frames(chunks(), [sink], result, engine.config, nothing)
    assert [int(frame.max()) for frame in sink.frames] == sorted(4 * list(range(7)))
    plain = FrameBuffer()
    write_frames(map(chunk, range(7)), [plain], other := Result(result.plan), engine.config, nothing)
    assert np.array_equal(plain.frames, sink.frames) and other.frames_sha256 == result.frames_sha256


def test_the_decoder_does_not_run_far_ahead(engine: Engine, result: Result) -> None:
    taken: list[int] = []

    class Behind(FrameBuffer):
        def write(self, frames_THW3: Frames) -> None:
            super().write(frames_THW3)
            ahead.append(len(taken) - len(self._chunks))

    def chunks() -> Iterator[torch.Tensor]:
        for number in range(20):
            taken.append(number)
            yield chunk(number)

    ahead: list[int] = []
    write_frames(chunks(), [Behind()], result, engine.config, nothing)
    assert len(ahead) == 20 and max(ahead) <= 4


def test_what_fails_while_writing_is_raised_where_it_is_decoded(engine: Engine, result: Result) -> None:
    decoded = []

    class Full(FrameBuffer):
        def write(self, frames_THW3: Frames) -> None:
            raise OSError("No space left on device")

    def chunks() -> Iterator[torch.Tensor]:
        for number in range(20):
            decoded.append(number)
            yield chunk(number)

    with pytest.raises(OSError, match="No space left"):
        write_frames(chunks(), [Full()], result, engine.config, nothing)
    assert len(decoded) <= 4


def test_nothing_is_written_after_a_frame_that_is_not_finite(engine: Engine, result: Result) -> None:
    sink = FrameBuffer()
    with pytest.raises(NotFiniteError):
        write_frames(iter([chunk(1), chunk(2) * torch.nan]), [sink], result, engine.config, nothing)
    assert all(frame.max() == 1 for frames in sink._chunks for frame in frames)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lockstep-writer")]
