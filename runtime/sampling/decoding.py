"""Writing of frames while they are decoded.

Tensor legend: B batch, T frames, H, W height and width, 3 colours.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch

from runtime.media.mp4 import Frames, FrameSink, to_uint8
from runtime.request.config import Config
from runtime.sampling.finite import check_frames
from runtime.sampling.result import Result

_AHEAD = 2  # chunks that wait to be written while the next is decoded


class At(Protocol):
    """Callback that hears that this rank is doing work of its own."""

    def __call__(self, *, busy: bool) -> None: ...


def write_frames(
    chunks: Iterator[torch.Tensor], sinks: Sequence[FrameSink], result: Result, config: Config, at: At
) -> None:
    """Write the frames of several videos while later ones are decoded, and tell the result their digests.

    A thread writes, in temporal order; what fails there is raised here. Seconds of writing are those in which
    nothing is decoded.

    Args:
        chunks: frames `[B, T, H, W, 3]` in [0, 1], in temporal order; decoded when they are asked for.
        sinks: one per video; none on ranks that have no frames.
        result: the run's result, which is told seconds and digests.
        config: its dtypes, for messages.
        at: called after each chunk: progress, which the other ranks see.

    Raises:
        NotFiniteError: a frame has NaN.
    """
    digests = [hashlib.sha256() for _ in sinks]

    def write(videos: list[Frames]) -> None:
        for frames, sink, digest in zip(videos, sinks, digests, strict=True):
            digest.update(frames.tobytes())
            sink.write(frames)

    writing: deque[Future[None]] = deque()
    writer = ThreadPoolExecutor(1, "lockstep-writer")
    try:
        while True:
            with result.seconds.measure("decode"):
                chunk_BTHW3 = next(chunks, None)
                if chunk_BTHW3 is None:
                    break
                check_frames(chunk_BTHW3, config)
                videos = [to_uint8(frames_THW3) for frames_THW3 in chunk_BTHW3]
            writing.append(writer.submit(write, videos))
            with result.seconds.measure("write"):
                while len(writing) > _AHEAD:
                    writing.popleft().result()
            at(busy=True)
        with result.seconds.measure("write"):
            for one in writing:
                one.result()
    finally:
        writer.shutdown(cancel_futures=True)
    result.frames_sha256 = [digest.hexdigest() for digest in digests]
