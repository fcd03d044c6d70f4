"""Predictors: the weight that every remembered feature gets in a forecast.

A predictor maps step indices to K numbers and knows nothing of features. A forecast is therefore linear in
the remembered features, and predictors are compared, blended and calibrated without touching a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from spectrum.chebyshev import ridge_weights


class Predictor(Protocol):
    """Rule that turns remembered steps into weights."""

    @property
    def memory(self) -> int | None:
        """Number of latest computed features that are used; None for all of them."""
        ...

    def weights(self, history: Sequence[int], target: int) -> NDArray[np.float64]:
        """Weights `[K]`, float64, of the forecast at step `target`.

        Args:
            history: the K ≥ 1 remembered step indices in ascending order, all below `target`; at most
                `memory`.
            target: step to forecast.
        """
        ...


@dataclass(frozen=True, slots=True)
class ChebyshevRidge:
    """Spectrum's spectral predictor: ridge regression on Chebyshev polynomials (paper, section 3).

    Attributes:
        horizon: number of sampler steps that spans τ ∈ [−1, 1].
        degree: highest polynomial degree M.
        ridge: regularisation λ.
    """

    horizon: float
    degree: int = 4
    ridge: float = 0.1

    @property
    def memory(self) -> None:
        return None

    def weights(self, history: Sequence[int], target: int) -> NDArray[np.float64]:
        return ridge_weights(history, target, degree=self.degree, ridge=self.ridge, horizon=self.horizon)


@dataclass(frozen=True, slots=True)
class LinearExtrapolation:
    """Straight line through the last two computed features; the last feature while there is only one."""

    @property
    def memory(self) -> int:
        return 2

    def weights(self, history: Sequence[int], target: int) -> NDArray[np.float64]:
        weights = np.zeros(len(history))
        weights[-1] = 1.0
        if len(history) > 1:
            previous, latest = history[-2:]
            slope = (target - latest) / (latest - previous)
            weights[-2:] += (-slope, slope)
        return weights


@dataclass(frozen=True, slots=True)
class Blend:
    """Mixture `share · first + (1 − share) · second` of two predictors, folded into the weights."""

    first: Predictor
    second: Predictor
    share: float

    @property
    def memory(self) -> int | None:
        memories = (self.first.memory, self.second.memory)
        return None if None in memories else max(m for m in memories if m is not None)

    def weights(self, history: Sequence[int], target: int) -> NDArray[np.float64]:
        return self.share * latest_weights(self.first, history, target) + (1.0 - self.share) * latest_weights(
            self.second, history, target
        )


def latest_weights(predictor: Predictor, history: Sequence[int], target: int) -> NDArray[np.float64]:
    """Weights of `predictor` on the steps that it remembers, zero on older ones."""
    kept = len(history) if predictor.memory is None else min(predictor.memory, len(history))
    weights = np.zeros(len(history))
    weights[len(history) - kept :] = predictor.weights(history[len(history) - kept :], target)
    return weights
