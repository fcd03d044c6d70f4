"""Seconds of steps as a report states them. Imports nothing slow."""

from __future__ import annotations

import math
from typing import Any

from spectrum import StepSeconds


def read_step_seconds(content: Any) -> StepSeconds:
    """Read the median seconds of a computed and a forecast step from a report's JSON.

    Raises:
        ValueError, TypeError, KeyError: it is not a report, or they are not numbers.
    """
    measured = content["step_seconds"]
    found = (measured["computed_median"], measured["forecast_median"])
    for one in found:
        if one is not None and not 0 <= one < math.inf:  # JSON knows NaN
            raise ValueError(f"{one} given; it must be a number of seconds")
    return StepSeconds(*found)


def read_window_seconds(content: Any) -> StepSeconds:
    """Read the same of one window: a step takes all windows of a video, unless each continues the one before.

    Raises:
        ValueError, TypeError, KeyError: as `read_step_seconds`.
    """
    request, of_step = content["request"], read_step_seconds(content)
    continues = request["image"] is not None or request.get("extend") is not None
    together = 1 if continues else content["windows"]
    if type(together) is not int or together < 1:
        raise ValueError(f"{together} given; a video has one window or more")
    parts = (of_step.computed, of_step.forecast)
    return StepSeconds(*(None if part is None else part / together for part in parts))
