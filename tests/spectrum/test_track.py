"""Tracks: one branch, driven step by step."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch

from spectrum import (
    ChebyshevRidge,
    ErrorSchedule,
    FixedSchedule,
    Forecaster,
    LinearExtrapolation,
    StepKind,
    Track,
    paper_schedule,
)

PREDICTOR = ChebyshevRidge(horizon=12)


def value(step: int) -> torch.Tensor:
    """A curve that no straight line follows."""
    return torch.linspace(-1, 1, 40).view(4, 10) * step + torch.arange(4).view(4, 1) * 0.1 * step**2


def never() -> torch.Tensor:
    pytest.fail("a forecast step computed something")


def test_a_track_computes_when_the_schedule_says_so_and_forecasts_as_a_forecaster_does() -> None:
    one, forecaster, computed = Track(PREDICTOR), Forecaster(PREDICTOR), []
    schedule = paper_schedule(12, warmup=3)

    def compute(step: int) -> Callable[[], torch.Tensor]:
        return lambda: (computed.append(step), value(step))[1]

    for step in range(12):
        advanced = one.advance(step, schedule.kind(step), compute(step))
        if schedule.kind(step) is StepKind.COMPUTE:
            assert torch.equal(advanced.value, value(step))
            expected = forecaster.squared_error(step, value(step)).read() if step else None
            assert (advanced.squares.read() if advanced.squares else None) == expected
            forecaster.record(step, value(step))
        else:
            assert advanced.squares is None
            assert torch.equal(advanced.value, forecaster.predict(step))
    assert tuple(computed) == schedule.computed == one.steps
    assert one.bytes == forecaster.bytes == len(computed) * 40 * 4


def test_the_errors_that_it_gives_drive_an_adaptive_schedule() -> None:
    """The loop of an integration, whole: a straight line is forecast without an error, a bend is not."""

    def computed(of_step: Callable[[int], torch.Tensor]) -> int:
        schedule, one = ErrorSchedule(40, tolerance=0.01, warmup=3), Track(LinearExtrapolation())
        count = 0
        for step in range(40):
            kind = schedule.kind(step)
            squares = one.advance(step, kind, lambda step=step: of_step(step)).squares
            count += kind is StepKind.COMPUTE
            if squares is not None:
                error, truth = squares.read()
                schedule.observe(step, (error / truth) ** 0.5)
        return count

    assert computed(lambda step: torch.ones(4) * (1.0 + step)) < 12
    assert computed(lambda step: torch.ones(4) * (-1.0) ** step) == 40


def test_a_track_that_goes_on_from_its_state_gives_the_same_bits() -> None:
    schedule = FixedSchedule.explicit(10, [0, 1, 2, 6])
    whole, before, after = Track(PREDICTOR), Track(PREDICTOR), Track(PREDICTOR)
    expected = [whole.advance(s, schedule.kind(s), lambda s=s: value(s)).value for s in range(10)]
    for step in range(5):
        before.advance(step, schedule.kind(step), lambda s=step: value(s))
    file = io.BytesIO()
    torch.save(before.state_dict(), file)
    file.seek(0)
    after.load_state_dict(torch.load(file, weights_only=True))
    assert after.steps == (0, 1, 2)
    for step in range(5, 10):
        advanced = after.advance(step, schedule.kind(step), lambda s=step: value(s))
        assert torch.equal(advanced.value, expected[step])


def test_what_cannot_be_driven_is_refused_and_nothing_is_remembered_of_it() -> None:
    one = Track(PREDICTOR)
    with pytest.raises(ValueError, match="no value was recorded to forecast step 0"):
        one.advance(0, StepKind.FORECAST, never)
    one.advance(2, StepKind.COMPUTE, lambda: value(2))
    for kind in StepKind:
        with pytest.raises(ValueError, match="step 2 is not later than the last recorded step 2"):
            one.advance(2, kind, lambda: value(2))
    for wrong in (value(3)[:2], value(3)[:, :1], value(3).double()):  # the second would be broadcast
        with pytest.raises(ValueError, match=r"step 3 has .*, but the stream is \[4, 10\] torch.float32"):
            one.advance(3, StepKind.COMPUTE, lambda wrong=wrong: wrong)
    assert one.steps == (2,)
