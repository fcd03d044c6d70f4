"""Steps that are wanted, and those that there is time for."""

from __future__ import annotations

import math
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from spectrum import FixedSchedule, Pace, StepKind, StepSeconds, Stopwatch, paper_schedule


def run(schedule: FixedSchedule, deadline: float, computed: float = 1.0, forecast: float = 0.01) -> list[int]:
    """Steps computed against a clock on which steps take just these times."""
    pace, watch, left, done = Pace(), Stopwatch(), deadline, []
    for step in range(schedule.steps):
        wanted = [s for s in schedule.computed if s >= step]
        kind = schedule.kind(step)
        if (
            kind is StepKind.COMPUTE
            and step
            and not pace.allows(left, watch.typical, len(wanted), schedule.steps - step)
        ):
            kind = StepKind.FORECAST
        seconds = computed if kind is StepKind.COMPUTE else forecast
        watch.add(kind, seconds)
        left -= seconds
        if kind is StepKind.COMPUTE:
            done.append(step)
    return done


def test_enough_time_changes_nothing() -> None:
    schedule = paper_schedule(50)
    assert run(schedule, deadline=15.0) == list(schedule.computed)


def test_too_little_time_spreads_what_can_be_computed() -> None:
    done = run(FixedSchedule.full(40), deadline=20.4)
    assert len(done) in (19, 20)
    assert max(b - a for a, b in pairwise(done)) <= 4


@given(deadline=st.floats(1.5, 60.0), steps=st.integers(5, 60))
def test_the_deadline_is_kept(deadline: float, steps: int) -> None:
    """As far as steps allow: forecasts alone take their time, and one step may be under way when it ends."""
    done = run(paper_schedule(steps), deadline)
    taken = len(done) + 0.01 * (steps - len(done))
    assert taken <= max(deadline, 1.0 + 0.01 * (steps - 1)) + 1.0


def test_no_time_forecasts_all_but_the_first() -> None:
    assert run(paper_schedule(50), deadline=0.5) == [0]


def test_without_a_deadline_or_with_costly_forecasts_all_is_allowed() -> None:
    assert Pace().allows(math.inf, StepSeconds(), 10, 20)
    assert Pace().allows(1.0, StepSeconds(1.0, 1.0), 10, 20)
