"""Schedules: which sampler steps are computed and which are forecast."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Final, Protocol, runtime_checkable

NOWHERE: Final[Mapping[int, int]] = MappingProxyType({})  # no history begins anew after step 0


class StepKind(StrEnum):
    """Kind of a step: the transformer's blocks run, or their output is forecast."""

    COMPUTE = "compute"
    FORECAST = "forecast"


class Schedule(Protocol):
    """Rule that says which steps are computed."""

    def kind(self, step: int) -> StepKind:
        """Kind of step `step`; asked once for every step, in ascending order."""
        ...


@runtime_checkable
class AdaptiveSchedule(Schedule, Protocol):
    """A schedule that reacts to the errors of its forecasts."""

    def observe(self, step: int, error: float) -> None:
        """Take note of the relative error that a forecast would have had at the computed step `step`."""
        ...


@dataclass(frozen=True, slots=True)
class FixedSchedule:
    """A schedule known before the first step.

    Attributes:
        steps: number of sampler steps n.
        computed: ascending indices of the computed steps; step 0 is always one of them.

    Raises:
        ValueError: an index is out of range, repeated or out of order, or step 0 is missing.
    """

    steps: int
    computed: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"a schedule needs at least 1 step, got {self.steps}")
        if not self.computed or self.computed[0] != 0:
            raise ValueError(f"step 0 must be computed, got computed steps {list(self.computed)}")
        if any(b <= a for a, b in zip(self.computed, self.computed[1:], strict=False)):
            raise ValueError(f"computed steps must ascend, got {list(self.computed)}")
        if self.computed[-1] >= self.steps:
            raise ValueError(f"computed step {self.computed[-1]} is beyond the last of {self.steps} steps")

    @classmethod
    def full(cls, steps: int) -> FixedSchedule:
        """Schedule that computes every step."""
        return cls(steps, tuple(range(steps)))

    @classmethod
    def explicit(cls, steps: int, computed: Iterable[int]) -> FixedSchedule:
        """Schedule that computes the steps of `computed`, given in any order."""
        return cls(steps, tuple(sorted(set(computed))))

    @property
    def nfe(self) -> int:
        """Computed transformer evaluations per branch."""
        return len(self.computed)

    def kind(self, step: int) -> StepKind:
        return StepKind.COMPUTE if step in self.computed else StepKind.FORECAST


def paper_schedule(
    steps: int,
    *,
    warmup: int = 5,
    window: float = 2.0,
    alpha: float = 0.75,
    fresh: Mapping[int, int] = NOWHERE,
) -> FixedSchedule:
    """Spectrum's schedule with a growing window.

    The first `warmup` steps are computed. Then a step is computed when (consecutive forecasts + 1) is a
    multiple of ⌊window⌋, and every such step adds `alpha` to the window, rounded to three decimals.

    Args:
        steps: number of sampler steps n ≥ 1.
        warmup: leading computed steps, ≥ 1.
        window: initial window 𝒩 ≥ 1.
        alpha: growth α ≥ 0. For n = 50, α = 0.75 computes 14 steps and α = 3.0 computes 10.
        fresh: step before which the history is dropped → leading computed steps from there on. The window
            begins anew there, too.

    Source: Spectrum (arXiv 2603.01623), section 3.3, and the behaviour of its reference implementation.
    """
    if warmup < 1 or not window >= 1 or not 0 <= alpha < math.inf:
        raise ValueError(f"need warmup ≥ 1, window ≥ 1, alpha ≥ 0; got {warmup}, {window}, {alpha}")
    computed: list[int] = []
    for start, end, leading in stretches(steps, {0: warmup, **fresh}):
        computed += range(start, min(start + leading, end))
        forecasts, growing = 0, window
        for step in range(start + leading, end):
            if (forecasts + 1) % math.floor(growing) == 0:
                computed.append(step)
                forecasts = 0
                growing = round(growing + alpha, 3)
            else:
                forecasts += 1
    return FixedSchedule(steps, tuple(computed))


def stretches(steps: int, fresh: Mapping[int, int]) -> list[tuple[int, int, int]]:
    """Divide `steps` where a history begins anew: first step, step after the last, leading computed steps.

    Args:
        fresh: first step of each stretch, step 0 among them → its leading computed steps.

    Example:
        >>> stretches(40, {0: 5, 26: 2})
        [(0, 26, 5), (26, 40, 2)]
    """
    starts = sorted(start for start in fresh if start < steps)
    return [(start, end, fresh[start]) for start, end in zip(starts, [*starts[1:], steps], strict=True)]


@dataclass(slots=True)
class ErrorSchedule:
    """A schedule that computes once forecasts are expected to be too bad, judging by their past errors.

    After the first `warmup` steps, the gap to the next computed step grows or shrinks with the ratio of
    `tolerance` to the error that was observed, by at most a factor of two at a time.

    Attributes:
        steps: number of sampler steps n.
        tolerance: relative forecast error to aim for, > 0.
        warmup: leading computed steps, ≥ 2: the second is the first whose forecast error is known.
        longest: largest distance from one computed step to the next, ≥ 1.
        budget: largest number of computed steps, ≥ warmup; None for no bound. Gaps grow early enough for it
            to last to the end.

    Source: step size control of ODE solvers (Hairer, Nørsett, Wanner, Solving Ordinary Differential Equations
    I, II.4), for an error that grows with the square of the gap, as a linear forecast's does.
    """

    steps: int
    tolerance: float
    warmup: int = 5
    longest: int = 8
    budget: int | None = None
    _last: int = 0
    _gap: int = 1
    _computed: int = 1

    def __post_init__(self) -> None:
        if not (self.steps >= 1 and self.tolerance > 0 and self.warmup >= 2 and self.longest >= 1):
            raise ValueError(f"need steps ≥ 1, tolerance > 0, warmup ≥ 2, longest ≥ 1; got {self}")
        if self.budget is not None and self.budget < self.warmup:
            raise ValueError(f"need budget ≥ warmup; got {self}")

    def kind(self, step: int) -> StepKind:
        due = step < self.warmup or step >= self._last + max(self._gap, self._least)
        return StepKind.COMPUTE if due else StepKind.FORECAST

    def observe(self, step: int, error: float) -> None:
        gap = step - self._last
        change = math.sqrt(self.tolerance / error) if error > 0 else 2.0
        self._gap = min(max(math.floor(gap * min(max(change, 0.5), 2.0)), 1), self.longest)
        self._last = step
        self._computed += 1

    @property
    def _least(self) -> int:
        """Shortest gap with which the budget lasts to the end."""
        if self.budget is None:
            return 1
        affordable, left = self.budget - self._computed, self.steps - self._last
        if affordable <= 0:
            return left
        even = math.ceil(left / (affordable + 1))
        return even if even > self.longest else max(left - affordable * self.longest, 1)
