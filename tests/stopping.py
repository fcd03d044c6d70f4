"""Generations that are stopped and resumed, for tests of what that must not change."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from runtime.checkpoint.folder import Checkpoints
from runtime.engine import Engine
from runtime.errors import CancelledError
from runtime.media.mp4 import FrameBuffer, Frames
from runtime.parallel.ranks import Ranks
from runtime.request.config import Config
from runtime.request.video_request import VideoRequest
from runtime.sampling.commands import Command
from runtime.sampling.denoise import StepRecord
from runtime.sampling.result import Result


class InterruptedHereError(Exception):
    """As if the process had been killed here."""


def generate(
    engine: Engine,
    request: VideoRequest,
    checkpoints: Checkpoints | None = None,
    until: int | None = None,
) -> tuple[Result, Frames]:
    """Generate; `until` is the step after which it is interrupted."""

    def after(record: StepRecord) -> None:
        if record.index == until:
            raise InterruptedHereError

    sink = FrameBuffer()
    result = engine.generate(request, [sink], after, checkpoints)
    return result, sink.frames


def interrupt(engine: Engine, request: VideoRequest, folder: Path, until: int, every: int = 1) -> None:
    """Interrupt a generation after a step; its checkpoints are in `folder`."""
    with pytest.raises(InterruptedHereError):
        generate(engine, request, Checkpoints(folder, every=every), until)
    for thread in threading.enumerate():
        if thread.name == "lockstep-checkpoint":
            thread.join()


def stop_and_resume(
    ranks: Ranks, config: Config, request: VideoRequest, root: Path, at: list[int]
) -> list[tuple[int, bool, bool]]:
    """Stopped after each step of `at`: where it was resumed; whether frames and decisions are the same."""
    engine, found = Engine(config, ranks), []
    sink = FrameBuffer()
    expected = engine.generate(request, [sink] if ranks.is_leader else [])
    for step in at:

        def stop(record: StepRecord, step: int = step) -> None:
            if record.index == step:
                engine.command(Command.STOP)

        folder, again = root / str(step), FrameBuffer()
        with pytest.raises(CancelledError):
            sinks = [FrameBuffer()] if ranks.is_leader else []
            engine.generate(request, sinks, stop, Checkpoints(folder, every=1))
        kept = Checkpoints(folder, every=1, resume=True)
        resumed = engine.generate(request, [again] if ranks.is_leader else [], checkpoints=kept)
        same = resumed.digests == expected.digests and resumed.errors == expected.errors
        same = same and [s.expert for s in resumed.steps] == [s.expert for s in expected.steps]
        found.append(
            (resumed.resumed_at, not ranks.is_leader or np.array_equal(again.frames, sink.frames), same)
        )
    return found
