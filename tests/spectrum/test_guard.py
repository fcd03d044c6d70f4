"""A watched plan computes more where forecasts are worse than planned."""

from __future__ import annotations

import pytest

from spectrum import GuardedSchedule, PlannedSteps, StepKind

PLAN = PlannedSteps(12, (0, 1, 4, 9), 0.1, (None, 0.1, 0.2, 0.3, 0.1, *[0.2] * 4, 0.1, 0.2, 0.3))


def computed(error: float, **settings: float) -> list[int]:
    """Steps computed when every error that is seen is `error`."""
    guard, steps = GuardedSchedule(PLAN, **settings), []  # type: ignore[arg-type]
    for step in range(PLAN.steps):
        if guard.kind(step) is StepKind.COMPUTE:
            steps.append(step)
            if step:
                guard.observe(step, error)
    return steps


def test_a_plan_that_holds_is_followed() -> None:
    assert computed(0.29) == [0, 1, 4, 9]


def test_a_gap_after_a_broken_bound_is_split() -> None:
    assert computed(0.31) == [0, 1, 2, 4, 6, 9, 10]


def test_there_is_a_limit() -> None:
    assert computed(9.0, most=1) == [0, 1, 2, 4, 9]
    assert computed(9.0, most=0) == [0, 1, 4, 9]
    assert computed(0.31, factor=4.0) == [0, 1, 4, 9]


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="factor > 0"):
        GuardedSchedule(PLAN, factor=0.0)
