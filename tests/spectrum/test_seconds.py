"""Seconds of steps: medians by kind, totals, and the time that is left."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectrum import StepKind, StepSeconds, Stopwatch, TimeLeft

C, F = StepKind.COMPUTE, StepKind.FORECAST


def test_typical_seconds_are_medians_of_each_kind() -> None:
    watch = Stopwatch()
    for seconds in (9.0, 1.0, 2.0):
        watch.add(C, seconds)
    assert watch.typical == (2.0, None)
    watch.add(F, 0.5)
    watch.add(F, 0.25)
    assert watch.typical == (2.0, 0.375)
    assert (watch.count(C), watch.count(F)) == (3, 2)
    assert (watch.typical.of(C), watch.typical.of(F)) == (2.0, 0.375)  # type: ignore[attr-defined]


def test_an_unknown_kind_takes_as_long_as_the_known_one() -> None:
    assert StepSeconds(10.0, 1.0).total(2, 3) == 23.0
    assert StepSeconds(10.0).total(2, 3) == 50.0
    assert StepSeconds(forecast=1.0).total(2, 3) == 5.0
    assert StepSeconds().total(2, 3) == 0.0


@given(
    computed=st.floats(0.1, 10.0),
    forecast=st.floats(0.001, 0.09),
    steps=st.integers(1, 60),
    nfe=st.integers(0, 60),
)
def test_what_is_affordable_fills_the_time(computed: float, forecast: float, steps: int, nfe: int) -> None:
    typical = StepSeconds(computed, forecast)
    seconds = typical.total(nfe, steps - nfe)
    assert typical.affordable(seconds, steps) == pytest.approx(nfe, abs=1e-6)


def test_time_left_counts_each_kind_by_itself() -> None:
    left = TimeLeft([C, C, F, F, C, F])
    assert (left.nfe, left.seconds) == (0, 0.0)
    left.add(0, C, 10.0)
    assert left.seconds == 50.0  # forecasts are not known yet: the worst is assumed
    left.add(1, C, 10.0)
    left.add(2, F, 1.0)
    assert left.seconds == pytest.approx(1 + 10 + 1)
    assert left.nfe == 2


def test_time_left_of_a_resumed_generation_counts_from_its_step() -> None:
    left = TimeLeft([C, C, F, F, C, F])
    left.add(3, F, 1.0)
    assert left.seconds == pytest.approx(1 + 1)  # of two steps, neither of which was seen to be slower
