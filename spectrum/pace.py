"""Pacing against a deadline: which of the steps that a schedule wants to compute there is time for."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from typing import NamedTuple

from spectrum.schedule import StepKind


class Timing(NamedTuple):
    """Time left and time per step, in seconds, as known before a step.

    Attributes:
        left: time until the deadline; infinite without one.
        computed, forecast: duration of one step of that kind; 0 until one was seen.
    """

    left: float = math.inf
    computed: float = 0.0
    forecast: float = 0.0


@dataclass(slots=True)
class Stopwatch:
    """Durations of steps by kind. The median counts, as the first step also sets things up."""

    _seconds: dict[StepKind, list[float]] = field(default_factory=lambda: {kind: [] for kind in StepKind})

    def add(self, kind: StepKind, seconds: float) -> None:
        """Add a step of `kind` that took `seconds`."""
        self._seconds[kind].append(seconds)

    def timing(self, left: float) -> Timing:
        """Timing as known now, `left` seconds before the deadline."""
        typical = {kind: statistics.median(taken or [0.0]) for kind, taken in self._seconds.items()}
        return Timing(left, typical[StepKind.COMPUTE], typical[StepKind.FORECAST])


@dataclass(slots=True)
class Pace:
    """Spreads the computed steps that there is time for evenly over the wanted ones.

    If there is time for all of them, nothing changes. Otherwise every wanted step earns the share of it that
    is affordable, and one is computed whenever the shares add up to a whole step. The share is recomputed at
    each step, so it follows steps that take longer or shorter than before.

    Attributes:
        credit: shares earned and not yet spent.
    """

    credit: float = 0.0

    def allows(self, timing: Timing, wanted: int, steps_left: int) -> bool:
        """Decide whether there is time to compute a wanted step; called once for each wanted step.

        Args:
            timing: time left and time per step.
            wanted: wanted computed steps from this one on, this one included.
            steps_left: all steps from this one on.
        """
        extra = timing.computed - timing.forecast
        if math.isinf(timing.left) or extra <= 0.0:
            return True
        affordable = (timing.left - steps_left * timing.forecast) / extra
        self.credit += min(max(affordable, 0.0) / max(wanted, 1), 1.0)
        if self.credit < 1.0 - 1e-9:
            return False
        self.credit -= 1.0
        return True
