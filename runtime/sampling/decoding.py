"""Writing of frames while they are decoded.

Tensor legend: B batch, T frames, H, W height and width, 3 colours.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from runtime.media.mp4 import FrameSink, to_uint8
from runtime.request.config import Config
from runtime.sampling.finite import check_frames
from runtime.sampling.result import Result


class At(Protocol):
    """Callback that hears that this rank is doing work of its own."""

    def __call__(self, *, busy: bool) -> None: ...


def write_frames(
    chunks: Iterator[torch.Tensor], sinks: Sequence[FrameSink], result: Result, config: Config, at: At
) -> None:
    """Write the frames of several videos, and tell the result their digests.

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
    while True:
        with result.seconds.measure("decode"):
            chunk_BTHW3 = next(chunks, None)
            if chunk_BTHW3 is None:
                break
            check_frames(chunk_BTHW3, config)
            videos = [to_uint8(frames_THW3) for frames_THW3 in chunk_BTHW3]
        with result.seconds.measure("write"):
            for frames, sink, digest in zip(videos, sinks, digests, strict=True):
                digest.update(frames.tobytes())
                sink.write(frames)
        at(busy=True)
    result.frames_sha256 = [digest.hexdigest() for digest in digests]
