"""Seconds of steps: what computed and forecast steps have taken, and what the remaining ones will take."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from spectrum.schedule import StepKind


class StepSeconds(NamedTuple):
    """Typical seconds of one computed and one forecast step; None for a kind that was never timed."""

    computed: float | None = None
    forecast: float | None = None

    @classmethod
    def medians(cls, computed: Sequence[float], forecast: Sequence[float]) -> StepSeconds:
        """Take the median of each kind's seconds: the first step also sets things up."""
        return cls(*(statistics.median(taken) if taken else None for taken in (computed, forecast)))

    def of(self, kind: StepKind) -> float | None:
        """Seconds of a step of one kind."""
        return self.computed if kind is StepKind.COMPUTE else self.forecast

    @property
    def extra(self) -> float:
        """Seconds by which computing a step takes longer than forecasting it."""
        return (self.computed or 0.0) - (self.forecast or 0.0)

    def total(self, computed: int, forecast: int) -> float:
        """Expected seconds of so many steps of each kind; an unknown kind takes as long as the known one."""
        fallback = max((one for one in self if one is not None), default=0.0)
        each = [fallback if one is None else one for one in self]
        return computed * each[0] + forecast * each[1]

    def affordable(self, seconds: float, steps: int) -> float:
        """Number of steps that can be computed within `seconds` if the others of `steps` are forecast."""
        return (seconds - steps * (self.forecast or 0.0)) / max(self.extra, 1e-9)


@dataclass(slots=True)
class Stopwatch:
    """Seconds of the steps so far, by kind."""

    _seconds: dict[StepKind, list[float]] = field(default_factory=lambda: {kind: [] for kind in StepKind})

    def add(self, kind: StepKind, seconds: float) -> None:
        """Add a step of `kind` that took `seconds`."""
        self._seconds[kind].append(seconds)

    def count(self, kind: StepKind) -> int:
        """Number of steps of one kind."""
        return len(self._seconds[kind])

    @property
    def typical(self) -> StepSeconds:
        """Typical seconds of each kind."""
        return StepSeconds.medians(self._seconds[StepKind.COMPUTE], self._seconds[StepKind.FORECAST])


class TimeLeft:
    """Estimates how long the remaining steps will take from the times of those done.

    Computed and forecast steps count separately: most computed steps come first, so one average over both
    would predict far too long a wait.

    Args:
        kinds: the expected kind of every step.
    """

    def __init__(self, kinds: Sequence[StepKind]):
        self._kinds, self._watch, self._done, self._before = kinds, Stopwatch(), 0, 0

    def add(self, step: int, kind: StepKind, seconds: float) -> None:
        """Take account of a finished step, which need not be of the kind that was expected.

        Steps that are left out were done by an earlier process; they count as the kind that was expected.
        """
        self._before += self._kinds[self._done : step].count(StepKind.COMPUTE)
        self._watch.add(kind, seconds)
        self._done = step + 1

    @property
    def nfe(self) -> int:
        """Number of computed steps so far."""
        return self._before + self._watch.count(StepKind.COMPUTE)

    @property
    def seconds(self) -> float:
        """Expected seconds of the remaining steps."""
        left = self._kinds[self._done :]
        return self._watch.typical.total(left.count(StepKind.COMPUTE), left.count(StepKind.FORECAST))
