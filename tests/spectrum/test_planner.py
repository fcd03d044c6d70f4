"""Plans against every other schedule, and their price against errors that were really made."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from numpy.typing import NDArray

from spectrum import CalibratedPredictor, Planner


def gram(seed: int, steps: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Values of a bent curve `[steps, size]`, and their Gram matrix of trace `steps`."""
    rng = np.random.default_rng(seed)
    times = np.linspace(0, 1, steps)[:, None]
    f = sum(rng.normal(size=300) * times**power for power in range(5)) + 0.05 * rng.normal(size=(steps, 300))
    f *= np.sqrt(steps / np.square(f).sum())
    return f, f @ f.T


def planner(seed: int = 0, steps: int = 11) -> tuple[Planner, NDArray[np.float64], NDArray[np.float64]]:
    f, g = gram(seed, steps)
    weights = np.random.default_rng(seed + 1).uniform(0.1, 1.0, steps)
    return Planner(CalibratedPredictor(g), weights.tolist()), f, weights


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("nfe", [1, 2, 3, 5, 10, 11])
def test_no_schedule_is_better(seed: int, nfe: int) -> None:
    one, _, _ = planner(seed)
    plan = one.plan(nfe)
    every = [one.price((0, *rest)) for rest in itertools.combinations(range(1, 11), nfe - 1)]
    assert plan.nfe == nfe
    assert plan.error == pytest.approx(min(other.error for other in every))


def test_the_price_is_the_error_that_the_gaps_leave() -> None:
    one, f, weights = planner()
    computed, square = (0, 1, 4, 8), 0.0
    predictor = CalibratedPredictor(f @ f.T)
    for first, last, history in ((2, 3, (0, 1)), (5, 7, (1, 4)), (9, 10, (4, 8))):
        error = sum(
            weights[t] * (f[t] - predictor.weights(history, t) @ f[list(history)])
            for t in range(first, last + 1)
        )
        square += float(np.square(error).sum())
    assert one.price(computed).error == pytest.approx(np.sqrt(square))


def test_more_steps_are_never_worse_and_all_of_them_are_exact() -> None:
    one, _, _ = planner(steps=20)
    errors = [one.plan(nfe).error for nfe in range(1, 21)]
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(errors))
    assert errors[-1] == 0.0


def test_expected_errors_are_of_the_forecasts_that_are_or_could_be_made() -> None:
    one, f, _ = planner()
    predictor = CalibratedPredictor(f @ f.T)
    plan = one.price((0, 2, 5))
    assert plan.errors[0] is None
    assert plan.errors[2] == pytest.approx(predictor.error([0], 2))
    assert plan.errors[7] == pytest.approx(predictor.error([2, 5], 7))
    assert plan.expected == {2: plan.errors[2], 5: plan.errors[5]}


def test_heavy_steps_are_computed() -> None:
    _, g = gram(0, 12)
    weights = [1e-3] * 12
    weights[7] = 1e3
    assert 7 in Planner(CalibratedPredictor(g), weights).plan(3).computed


def test_plans_are_quick_and_always_the_same() -> None:
    began = time.perf_counter()
    plans = {planner(steps=50)[0].plan(14).computed for _ in range(3)}
    assert len(plans) == 1
    assert time.perf_counter() - began < 6.0  # two seconds each are promised; a tenth is usual


@pytest.mark.parametrize("nfe", [0, 12])
def test_impossible_budgets_are_refused(nfe: int) -> None:
    with pytest.raises(ValueError, match="nfe must be within 1 … 11"):
        planner()[0].plan(nfe)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="one finite weight"):
        Planner(CalibratedPredictor(np.eye(4)), [1.0] * 5)
    with pytest.raises(ValueError, match="at most 200 steps"):
        Planner(CalibratedPredictor(np.eye(201)), [1.0] * 201)


def of_two(fresh: dict[int, int], seed: int = 0) -> tuple[Planner, NDArray[np.float64], NDArray[np.float64]]:
    """A planner of 11 steps whose history is dropped on the way."""
    f, g = gram(seed, 11)
    weights = np.random.default_rng(seed + 1).uniform(0.1, 1.0, 11)
    return Planner(CalibratedPredictor(g), weights.tolist(), fresh), f, weights


@pytest.mark.parametrize("fresh", [{6: 1}, {6: 2}, {4: 3}, {10: 1}, {1: 2}, {4: 1, 7: 2}])
@pytest.mark.parametrize("nfe", [4, 5, 8, 11])
def test_no_schedule_that_begins_each_history_is_better(fresh: dict[int, int], nfe: int) -> None:
    one, _, _ = of_two(fresh)
    leading = {0, *(step for start, count in fresh.items() for step in range(start, start + count))}
    assert one.least == len(leading)
    plan = one.plan(nfe)
    free = sorted(set(range(11)) - leading)
    others = itertools.combinations(free, nfe - len(leading))
    every = [one.price(sorted(leading | set(other))) for other in others]
    assert plan.nfe == nfe and leading <= set(plan.computed)
    assert plan.error == pytest.approx(min(other.error for other in every))
    with pytest.raises(ValueError, match=f"nfe must be within {one.least} … 11"):
        one.plan(one.least - 1)


def test_nothing_is_forecast_from_before_a_history_that_begins_anew() -> None:
    one, f, weights = of_two({5: 1})
    computed, square = (0, 2, 5, 8), 0.0
    predictor = CalibratedPredictor(f @ f.T)
    for first, last, history in ((1, 1, (0,)), (3, 4, (0, 2)), (6, 7, (5,)), (9, 10, (5, 8))):
        error = sum(
            weights[t] * (f[t] - predictor.weights(history, t) @ f[list(history)])
            for t in range(first, last + 1)
        )
        square += float(np.square(error).sum())
    plan = one.price(computed)
    assert plan.error == pytest.approx(np.sqrt(square))
    assert plan.errors[0] is None and plan.errors[5] is None and 5 not in plan.expected
    assert plan.errors[7] == pytest.approx(predictor.error([5], 7))
