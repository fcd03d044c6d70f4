"""Schedules: the published ones, and any other length."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectrum import ErrorSchedule, FixedSchedule, StepKind, paper_schedule


@pytest.mark.parametrize(
    ("alpha", "computed"),
    [
        (0.75, (0, 1, 2, 3, 4, 6, 8, 11, 15, 20, 25, 31, 38, 46)),
        (3.0, (0, 1, 2, 3, 4, 6, 11, 19, 30, 44)),
    ],
)
def test_published_schedules_of_50_steps(alpha: float, computed: tuple[int, ...]) -> None:
    schedule = paper_schedule(50, alpha=alpha)
    assert schedule.computed == computed
    assert schedule.nfe == {0.75: 14, 3.0: 10}[alpha]


@given(
    steps=st.integers(1, 300),
    warmup=st.integers(1, 20),
    window=st.floats(1, 10),
    alpha=st.floats(0, 5),
)
def test_paper_schedule_by_its_own_rule(steps: int, warmup: int, window: float, alpha: float) -> None:
    """Walk the schedule with the rule stated as gaps: each gap is ⌊window⌋, and the window grows after it."""
    schedule = paper_schedule(steps, warmup=warmup, window=window, alpha=alpha)
    assert schedule.computed[: min(warmup, steps)] == tuple(range(min(warmup, steps)))
    previous = warmup - 1
    for step in schedule.computed[warmup:]:
        assert step - previous == int(window)
        previous, window = step, round(window + alpha, 3)
    assert previous + int(window) >= steps or steps <= warmup


def test_kinds_follow_the_computed_steps() -> None:
    schedule = FixedSchedule.explicit(6, [3, 0, 3])
    kinds = [schedule.kind(step) for step in range(6)]
    assert [i for i, kind in enumerate(kinds) if kind is StepKind.COMPUTE] == [0, 3]
    assert kinds.count(StepKind.FORECAST) == 4


def test_the_papers_schedule_begins_anew_with_another_expert() -> None:
    """Up to there it is that of all steps, and from there on that of the steps that are left."""
    whole = paper_schedule(40)
    anew = paper_schedule(40, fresh={26: 2})
    assert anew.computed[: len([c for c in whole.computed if c < 26])] == tuple(
        c for c in whole.computed if c < 26
    )
    assert tuple(c for c in anew.computed if c >= 26) == tuple(
        26 + c for c in paper_schedule(14, warmup=2).computed
    )
    assert paper_schedule(40, fresh={38: 5}).computed[-2:] == (38, 39)


def test_full_schedule_computes_everything() -> None:
    assert FixedSchedule.full(7).nfe == 7


@pytest.mark.parametrize("computed", [(), (1, 2), (0, 2, 2), (0, 3, 1), (0, 9), (0, -1)])
def test_impossible_schedules_are_refused(computed: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="step"):
        FixedSchedule(5, computed)


@pytest.mark.parametrize(
    "bad",
    [{"warmup": 0}, {"window": 0.5}, {"alpha": -1.0}, {"alpha": float("nan")}, {"window": float("nan")}],
)
def test_impossible_paper_rules_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="need"):
        paper_schedule(50, **bad)  # type: ignore[arg-type]


def observed(schedule: ErrorSchedule, error: Callable[[int], float]) -> list[int]:
    """Computed steps, when a forecast over a gap has the error `error(gap)`."""
    computed: list[int] = []
    for step in range(schedule.steps):
        if schedule.kind(step) is StepKind.COMPUTE:
            if computed:
                schedule.observe(step, error(step - computed[-1]))
            computed.append(step)
    return computed


def test_error_schedule_settles_where_the_error_is_the_tolerance() -> None:
    computed = observed(ErrorSchedule(60, tolerance=0.16, warmup=3), lambda gap: 0.01 * gap**2)
    gaps = [b - a for a, b in pairwise(computed)]
    assert computed[:3] == [0, 1, 2]
    assert gaps[-4:] == [4] * 4  # 0.01 · 4² = 0.16


def test_error_schedule_computes_everything_when_nothing_can_be_forecast() -> None:
    assert observed(ErrorSchedule(12, tolerance=0.01), lambda gap: 1.0) == list(range(12))


def test_error_schedule_never_waits_longer_than_allowed() -> None:
    computed = observed(ErrorSchedule(40, tolerance=1.0, longest=5), lambda gap: 0.0)
    assert max(b - a for a, b in pairwise(computed)) == 5


@pytest.mark.parametrize("wrong", [{"tolerance": 0.0}, {"warmup": 1}, {"longest": 0}, {"steps": 0}])
def test_error_schedule_refuses_nonsense(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="need steps ≥ 1"):
        ErrorSchedule(**{"steps": 9, "tolerance": 0.1, **wrong})  # type: ignore[arg-type]


@pytest.mark.parametrize("budget", [5, 7, 10, 14, 30])
@pytest.mark.parametrize("error", [0.001, 1.0])
def test_error_schedule_keeps_its_budget_to_the_end(budget: int, error: float) -> None:
    """However bad the forecasts are, it neither computes more nor has spent everything too early."""
    schedule = ErrorSchedule(50, tolerance=0.1, longest=8, budget=budget)
    computed = observed(schedule, lambda gap: error)
    assert len(computed) <= budget
    even = -(-(50 - 4) // (budget - 5 + 1))  # from the last step of the warm-up
    assert max(b - a for a, b in pairwise([*computed, 50])) <= max(8, even)


def test_error_schedule_refuses_a_budget_below_its_warmup() -> None:
    with pytest.raises(ValueError, match="budget ≥ warmup"):
        ErrorSchedule(50, tolerance=0.1, warmup=5, budget=4)
