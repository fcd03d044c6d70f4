"""Previews of a run: clean estimates in few colours, for a sink that shows them.

Tensor legend: B batch, C latent channels, F latent frames, H, W latent height and width, 3 colours.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

from runtime.media.mp4 import to_uint8
from runtime.media.preview import MOST_FRAMES, PreviewSink
from runtime.sampling.estimate import Estimate


class PreviewMaker:
    """Makes a preview of a clean estimate when one is due; an `OnEstimate`.

    Args:
        sink: receives the previews.
        colours: latents `[B, C, F, H, W]` in float32 → their colours `[B, F, H, W, 3]` in [0, 1].
        frame_seconds: how long a latent frame lasts in the video.
        taken: list to which the seconds that each preview took are added.
    """

    def __init__(
        self,
        sink: PreviewSink,
        colours: Callable[[torch.Tensor], torch.Tensor],
        frame_seconds: float,
        taken: list[float],
    ):
        self._sink, self._colours, self._frame_seconds, self._taken = sink, colours, frame_seconds, taken

    def __call__(self, estimate: Estimate) -> None:
        """Show the estimate, unless it is too early for another preview."""
        if not self._sink.due:
            return
        started = time.perf_counter()
        every = math.ceil(estimate.frames / MOST_FRAMES)
        frames = to_uint8(self._colours(estimate.clean(every)))
        self._sink.show(frames, every * self._frame_seconds)
        self._taken.append(time.perf_counter() - started)
