"""Predictors, as weights on remembered steps."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectrum import Blend, ChebyshevRidge, LinearExtrapolation, ridge_weights

HISTORY = [0, 1, 2, 3, 4, 6, 8]


def test_chebyshev_ridge_uses_its_settings() -> None:
    weights = ChebyshevRidge(horizon=50, degree=3, ridge=0.2).weights(HISTORY, 10)
    np.testing.assert_array_equal(weights, ridge_weights(HISTORY, 10, degree=3, ridge=0.2, horizon=50))


@given(st.floats(-10, 10), st.floats(-10, 10), st.integers(9, 40))
def test_linear_extrapolation_continues_the_line(offset: float, slope: float, target: int) -> None:
    values = offset + slope * np.asarray(HISTORY)
    forecast = LinearExtrapolation().weights(HISTORY, target) @ values
    assert forecast == pytest.approx(offset + slope * target, abs=1e-9)


def test_linear_extrapolation_from_one_value_repeats_it() -> None:
    assert LinearExtrapolation().weights([4], 9).tolist() == [1.0]


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_blend_is_the_weighted_mean_of_both_forecasts(share: float) -> None:
    spectral, line = ChebyshevRidge(horizon=50), LinearExtrapolation()
    expected = share * spectral.weights(HISTORY, 10) + (1 - share) * line.weights(HISTORY, 10)
    np.testing.assert_allclose(Blend(spectral, line, share).weights(HISTORY, 10), expected)


def test_blend_remembers_as_much_as_its_parts_need() -> None:
    line, spectral = LinearExtrapolation(), ChebyshevRidge(horizon=50)
    assert Blend(line, line, 0.5).memory == 2
    assert Blend(line, spectral, 0.5).memory is None
