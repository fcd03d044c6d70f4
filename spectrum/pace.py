"""A schedule against the clock: which of the steps that a schedule wants there is time for."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from typing import NamedTuple

from spectrum.schedule import StepKind


class Timing(NamedTuple):
    """What is known of time before a step, in seconds.

    Attributes:
        left: until the deadline; infinite where there is none.
        computed, forecast: of one step of the kind; 0 where none was seen yet.
    """

    left: float = math.inf
    computed: float = 0.0
    forecast: float = 0.0


@dataclass(slots=True)
class Stopwatch:
    """Times steps. The median counts: a first step also sets things up."""

    _seconds: dict[StepKind, list[float]] = field(default_factory=lambda: {kind: [] for kind in StepKind})

    def add(self, kind: StepKind, seconds: float) -> None:
        """A step of `kind` has taken `seconds`."""
        self._seconds[kind].append(seconds)

    def timing(self, left: float) -> Timing:
        """What is known now, `left` seconds before the deadline."""
        typical = {kind: statistics.median(taken or [0.0]) for kind, taken in self._seconds.items()}
        return Timing(left, typical[StepKind.COMPUTE], typical[StepKind.FORECAST])


@dataclass(slots=True)
class Pace:
    """Spreads the computed steps that there is time for evenly over those that are wanted.

    Where the time suffices for all of them nothing changes. Otherwise every wanted step earns the share of it
    that can be afforded, and one is computed whenever the shares add up to a whole step; the share is worked
    out anew at each step, so steps that take longer or shorter than before change what follows.

    Attributes:
        credit: shares that were earned and not spent.
    """

    credit: float = 0.0

    def allows(self, timing: Timing, wanted: int, steps_left: int) -> bool:
        """Whether a step that the schedule wants to compute is computed; asked once for each.

        Args:
            wanted: steps that are to be computed from this one on, this one included.
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
