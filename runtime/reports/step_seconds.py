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
