"""Prompt travel: a long video whose prompt changes over time.

Each window is conditioned on text embeddings interpolated linearly between the two prompts around its place
in the video. A change is therefore gradual, over the windows between two prompts, and there is no cut.

Tensor legend: B batch, T text tokens, E text encoder channels.
Source: interpolation of text embeddings along time, as in "prompt travel" for AnimateDiff.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import torch

from runtime.models.base import Embeddings
from runtime.request.video_request import VideoRequest
from runtime.request.windows import Windows


def window_embeddings(request: VideoRequest, windows: Windows, text: Embeddings) -> list[list[torch.Tensor]]:
    """Interpolate the embeddings of each window's branches, the conditional branch first.

    The first window lies at 0, the last at 1. Without travel, all windows share one tensor.
    """
    places = [0.0, *(point.at for point in request.travel)]
    negative = [] if text.negative is None else [text.negative]
    furthest = max(windows.starts[-1], 1)
    return [[_between(text.prompts, places, start / furthest), *negative] for start in windows.starts]


def _between(values: Sequence[torch.Tensor], places: Sequence[float], at: float) -> torch.Tensor:
    """Interpolate linearly between values; constant after the last.

    Args:
        values: values at `places`.
        places: strictly ascending, the first at most `at`.
        at: place to interpolate at.
    """
    after = bisect_right(places, at)
    if after == len(places) or places[after - 1] == at:
        return values[after - 1]
    share = (at - places[after - 1]) / (places[after] - places[after - 1])
    return torch.lerp(values[after - 1], values[after], share)
