"""The basis and the ridge weights, against independent derivations in float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.polynomial import chebyshev
from numpy.typing import NDArray

from spectrum import chebyshev_basis, ridge_weights


def normalised(steps: NDArray[np.float64], horizon: float) -> NDArray[np.float64]:
    return 2 * steps / horizon - 1


def dense_forecast(
    history: list[int], target: int, values: NDArray[np.float64], *, degree: int, ridge: float, horizon: float
) -> NDArray[np.float64]:
    """The textbook way: fit coefficients to the augmented least-squares problem with LAPACK, and evaluate."""
    phi = chebyshev.chebvander(normalised(np.asarray(history, float), horizon), degree)
    augmented = np.vstack([phi, np.sqrt(ridge) * np.eye(degree + 1)])
    padded = np.vstack([values, np.zeros((degree + 1, values.shape[1]))])
    coefficients, *_ = np.linalg.lstsq(augmented, padded, rcond=None)
    evaluated: NDArray[np.float64] = chebyshev.chebvander(
        normalised(np.asarray([target], float), horizon), degree
    )
    return (evaluated @ coefficients)[0]


@given(st.floats(-1, 1), st.integers(0, 12))
def test_basis_is_the_cosine_definition(tau: float, degree: int) -> None:
    expected = [np.cos(m * np.arccos(tau)) for m in range(degree + 1)]
    np.testing.assert_allclose(chebyshev_basis(tau, degree), expected, atol=1e-12)


def test_basis_keeps_the_shape_of_its_points() -> None:
    assert chebyshev_basis(np.zeros((2, 3)), 4).shape == (2, 3, 5)
    assert chebyshev_basis(0.3, 0).tolist() == [1.0]


@given(
    history=st.lists(st.integers(0, 199), min_size=1, max_size=14, unique=True).map(sorted),
    ahead=st.integers(1, 10),
    degree=st.integers(0, 6),
    ridge=st.floats(1e-4, 10),
    slack=st.integers(1, 100),
)
def test_weights_equal_dense_least_squares(
    history: list[int], ahead: int, degree: int, ridge: float, slack: int
) -> None:
    target = history[-1] + ahead
    horizon = float(target + slack)
    values = np.random.default_rng(len(history)).standard_normal((len(history), 5))
    expected = dense_forecast(history, target, values, degree=degree, ridge=ridge, horizon=horizon)
    weights = ridge_weights(history, target, degree=degree, ridge=ridge, horizon=horizon)
    np.testing.assert_allclose(weights @ values, expected, rtol=1e-10, atol=1e-10)


@given(st.integers(0, 4), st.integers(0, 2**32 - 1))
def test_polynomials_up_to_the_degree_are_exact_without_ridge(degree: int, seed: int) -> None:
    history, target, horizon = [0, 3, 4, 9, 15, 20, 28], 33, 50
    coefficients = np.random.default_rng(seed).standard_normal(degree + 1)
    values = chebyshev.chebval(normalised(np.asarray([*history, target], float), horizon), coefficients)
    for ridge in (0.0, 1e-13):
        weights = ridge_weights(history, target, degree=4, ridge=ridge, horizon=horizon)
        assert weights @ values[:-1] == pytest.approx(values[-1], abs=1e-7)


def test_error_on_polynomials_vanishes_with_the_ridge() -> None:
    history, target = [0, 1, 2, 3, 4, 6, 8, 11, 15], 18
    values = chebyshev.chebval(normalised(np.asarray([*history, target], float), 50), [0.3, -1, 0.5, 0.2])
    errors = [
        abs(ridge_weights(history, target, degree=4, ridge=r, horizon=50) @ values[:-1] - values[-1])
        for r in (1e-1, 1e-3, 1e-5, 1e-7, 1e-9)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3 * errors[0]


def test_fewer_points_than_coefficients_take_the_smallest_fit() -> None:
    weights = ridge_weights([7], 9, degree=4, ridge=0.0, horizon=50)
    limit = ridge_weights([7], 9, degree=4, ridge=1e-12, horizon=50)
    np.testing.assert_allclose(weights, limit, rtol=1e-9)


@pytest.mark.parametrize(
    ("history", "changed", "named"),
    [
        ([], {}, "history"),
        ([3, 3], {}, "history"),
        ([0, 1], {"ridge": -1.0}, "ridge"),
        ([0, 1], {"ridge": float("nan")}, "ridge"),
        ([0, 1], {"horizon": 0.0}, "horizon"),
        ([0, 1], {"degree": -1}, "degree"),
    ],
)
def test_arguments_out_of_range_are_named(history: list[int], changed: dict[str, float], named: str) -> None:
    arguments = {"degree": 4, "ridge": 0.1, "horizon": 50.0, **changed}
    with pytest.raises(ValueError, match=named):
        ridge_weights(history, 5, **arguments)  # type: ignore[arg-type]
