"""Calibrated weights against the least squares that they stand for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from spectrum import CalibratedPredictor, Forecaster, mean_gram, surprise


def trajectory(seed: int = 0, steps: int = 8, size: int = 200) -> NDArray[np.float64]:
    """`[steps, size]`: a smooth curve with some noise."""
    rng = np.random.default_rng(seed)
    times = np.linspace(0, 1, steps)[:, None]
    curve = rng.normal(size=size) + rng.normal(size=size) * times + rng.normal(size=size) * times**2
    return curve + 0.02 * rng.normal(size=(steps, size))


def predictor(values: NDArray[np.float64], ridge: float = 0.0) -> CalibratedPredictor:
    return CalibratedPredictor(values @ values.T, ridge)


def test_the_slope_is_that_of_least_squares() -> None:
    f = trajectory()
    slope = np.linalg.lstsq((f[4] - f[2])[:, None], f[7] - f[4], rcond=None)[0][0]
    assert predictor(f).weights([2, 4], 7) == pytest.approx([-slope, 1 + slope])


def test_the_expected_error_is_the_error_of_the_forecast() -> None:
    f = trajectory()
    forecaster = Forecaster(predictor(f))
    for step in (1, 4):
        forecaster.record(step, torch.from_numpy(f[step]))
    forecast = forecaster.predict(6).numpy()
    measured = np.linalg.norm(f[6] - forecast) / np.linalg.norm(f[6])
    assert predictor(f).error([1, 4], 6) == pytest.approx(measured)


def test_a_value_alone_is_kept() -> None:
    assert predictor(trajectory()).weights([0], 5).tolist() == [1.0]
    assert predictor(trajectory()).memory == 2


def test_ridge_shortens_the_slope() -> None:
    f = trajectory()
    assert predictor(f, 1.0).weights([0, 3], 6)[0] == pytest.approx(predictor(f).weights([0, 3], 6)[0] / 2)


def test_steps_that_do_not_differ_give_no_slope() -> None:
    still = np.ones((4, 4))
    assert CalibratedPredictor(still).weights([0, 1], 3).tolist() == [0.0, 1.0]


def test_the_mean_weighs_every_video_the_same() -> None:
    f, g = trajectory(1), 1000 * trajectory(2)
    mean = mean_gram([f @ f.T, g @ g.T])
    assert np.trace(mean) == pytest.approx(len(f))
    assert mean == pytest.approx(mean_gram([f @ f.T, g @ g.T / 1e6]))


@pytest.mark.parametrize("grams", [[], [np.ones((2, 3))], [np.zeros((2, 2))], [np.eye(2), np.eye(3)]])
def test_what_is_no_gram_matrix_is_refused(grams: list[NDArray[np.float64]]) -> None:
    with pytest.raises(ValueError, match="Gram"):
        mean_gram(grams)


@pytest.mark.parametrize(("history", "target"), [([0, 3], 8), ([0, 3], 3), ([], 2)])
def test_steps_it_was_not_calibrated_for_are_refused(history: list[int], target: int) -> None:
    with pytest.raises(ValueError, match="calibrated for steps 0 … 7"):
        predictor(trajectory()).weights(history, target)


def test_surprise_is_the_mean_of_the_orders_of_magnitude() -> None:
    assert surprise({1: 0.1, 2: 10.0, 5: 1.0}, {1: 1.0, 2: 1.0, 9: 3.0}) == pytest.approx(0.0)
    assert surprise({1: 1.0, 2: 10.0}, {1: 1.0, 2: 1.0}) == pytest.approx(0.5)
    assert surprise({}, {1: 1.0}) == 0.0
