"""Guarded schedule: where forecasts turn out worse than planned, more steps are computed."""

from __future__ import annotations

from dataclasses import dataclass, field

from spectrum.planner import PlannedSteps
from spectrum.schedule import StepKind


@dataclass(slots=True)
class GuardedSchedule:
    """A schedule that follows `plan`, and splits the next gap in two when an error exceeds the expected one.

    At a computed step, the error that a forecast would have had is compared with what the plan expected; if
    it is more than `factor` times that, the middle of the following gap is computed, too.

    Attributes:
        plan: planned steps and expected errors.
        factor: tolerated ratio of measured to expected error, > 0.
        most: largest number of extra steps.
        added: extra steps so far.
    """

    plan: PlannedSteps
    factor: float = 3.0
    most: int = 4
    added: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not (self.factor > 0 and self.most >= 0):
            raise ValueError(f"need factor > 0 and most ≥ 0, got {self.factor}, {self.most}")

    @property
    def steps(self) -> int:
        """Number of sampler steps."""
        return self.plan.steps

    def kind(self, step: int) -> StepKind:
        return StepKind.COMPUTE if step in self.plan.computed or step in self.added else StepKind.FORECAST

    def observe(self, step: int, error: float) -> None:
        expected = self.plan.expected.get(step)
        if expected is None or error <= self.factor * expected or len(self.added) >= self.most:
            return
        following = next((c for c in self.plan.computed if c > step), self.plan.steps)
        middle = (step + following) // 2
        if middle > step:
            self.added.append(middle)
