"""Previews of a run: clean estimates in few colours, for a sink that shows them.

Tensor legend: B batch, C latent channels, F latent frames, H, W latent height and width, 3 colours.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Protocol, Self

import torch

from runtime.media.mp4 import to_uint8
from runtime.media.preview import MOST_FRAMES, PreviewSink
from runtime.parallel.ranks import Ranks
from runtime.sampling.estimate import Estimate, OnEstimate, unseen
from runtime.sampling.memory import if_room
from runtime.sampling.result import Result


class Colours(Protocol):
    """Map of latents to colours."""

    def to(self, device: torch.device) -> Self:
        """The same on another device."""
        ...

    def rgb(self, latents_BCFHW: torch.Tensor) -> torch.Tensor:
        """Colours `[B, F, H, W, 3]` in [0, 1] of latents in float32."""
        ...


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


def show_previews(
    sink: PreviewSink | None,
    find_colours: Callable[[], Colours] | None,
    frame_seconds: float,
    result: Result,
    ranks: Ranks,
    model: str,
) -> OnEstimate:
    """Make what shows previews of a run; of a run without any, what shows none.

    Args:
        sink: receives the previews; None if none are wanted.
        find_colours: finds the colours of the model's latents, which takes a while; None if it has none.
        frame_seconds: how long a latent frame lasts in the video.
        result: the run's result, which is told the seconds that previews take, and why there are none.
        ranks: this rank.
        model: name of the model.
    """
    if sink is None:
        return unseen
    result.preview_seconds = []
    if find_colours is None:
        result.warnings.append(f"preview: none is shown, as {model} has no map to colours")
        return unseen
    with ranks.busy("fitting the colours of previews"):
        colours = if_room(lambda: find_colours().to(ranks.device))
    if colours is None:
        result.warnings.append("preview: none is shown, as memory does not suffice to fit its colours")
        return unseen
    return PreviewMaker(sink, colours.rgb, frame_seconds, result.preview_seconds)
