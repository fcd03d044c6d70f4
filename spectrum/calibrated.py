"""Calibrated prediction: two remembered values, extrapolated with the slope of least expected error.

The Gram matrix G[i, j] = E⟨f_i, f_j⟩ of a stream over the steps of a sampler gives the best weights for any
two remembered steps, and the error that they leave, without reading another tensor. The straight line through
two values overshoots where the stream bends or is noisy; the slope used here is damped exactly as much as the
stream requires.

Legend: n sampler steps; a < b the two latest computed steps; t the target.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Gram = NDArray[np.float64]


def mean_gram(grams: Iterable[Gram]) -> Gram:
    """Mean of Gram matrices `[n, n]`, each scaled to trace n, so that every video counts the same.

    Raises:
        ValueError: `grams` is empty, the shapes differ, or a matrix is not finite or has no positive trace.
    """
    scaled: list[Gram] = []
    for gram in grams:
        if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or (scaled and gram.shape != scaled[0].shape):
            raise ValueError(f"Gram matrices must be square and of one shape, got {list(gram.shape)}")
        trace = float(np.trace(gram))
        if not np.isfinite(gram).all() or trace <= 0.0:
            raise ValueError(f"a Gram matrix must be finite and its trace above 0, got {trace}")
        scaled.append((gram + gram.T) * (0.5 * len(gram) / trace))
    if not scaled:
        raise ValueError("at least one Gram matrix is needed")
    mean: Gram = np.mean(scaled, axis=0)
    return mean


@dataclass(frozen=True, slots=True, eq=False)
class CalibratedPredictor:
    """Predictor f_t ≈ f_b + s (f_b − f_a), with the slope s that is best on average; f_b if it is alone.

    Attributes:
        gram: the stream's Gram matrix, `[n, n]`, symmetric.
        ridge: relative damping of the slope, ≥ 0, for pairs of steps that hardly differ.
    """

    gram: Gram
    ridge: float = 1e-3

    def __post_init__(self) -> None:
        if self.gram.ndim != 2 or self.gram.shape[0] != self.gram.shape[1] or not 0 <= self.ridge < math.inf:
            raise ValueError(f"need a square matrix and ridge ≥ 0, got {list(self.gram.shape)}, {self.ridge}")

    @property
    def memory(self) -> int:
        return 2

    def weights(self, history: Sequence[int], target: int) -> NDArray[np.float64]:
        self._check(history, target)
        weights = np.zeros(len(history))
        weights[-1] = 1.0
        if len(history) > 1:
            slope = self.slopes(history[-1])[target, history[-2]]
            weights[-2:] += (-slope, slope)
        return weights

    def slopes(self, b: int) -> NDArray[np.float64]:
        """Slopes `[t, a]` towards every step t, from step b and every step a."""
        step = moved(self.gram, b)  # ⟨f_t − f_b, f_u − f_b⟩
        lengths = step.diagonal() * (1.0 + self.ridge)
        found: NDArray[np.float64] = -step / np.where(lengths > 0.0, lengths, np.inf)
        return found

    def error(self, history: Sequence[int], target: int) -> float:
        """Expected relative error of the forecast at `target`: √(E‖f_t − forecast‖² / E‖f_t‖²)."""
        weights, steps = self.weights(history, target), [*history, target]
        combination = np.append(-weights, 1.0)
        square = combination @ self.gram[np.ix_(steps, steps)] @ combination
        return math.sqrt(max(float(square), 0.0) / float(self.gram[target, target]))

    def _check(self, history: Sequence[int], target: int) -> None:
        if not history or not 0 <= history[-1] < target < len(self.gram):
            raise ValueError(
                f"calibrated for steps 0 … {len(self.gram) - 1}; "
                f"step {target} cannot be forecast from {list(history)}"
            )


def moved(gram: Gram, origin: int) -> Gram:
    """Gram matrix of f_t − f_origin."""
    shifted: Gram = gram - gram[:, origin : origin + 1] - gram[origin] + gram[origin, origin]
    return shifted


def surprise(measured: dict[int, float], expected: dict[int, float]) -> float:
    """Mean of log₁₀(measured / expected): how much worse forecasts were than expected.

    It is taken over the steps that both know, and 0 if there are none. Both map steps to relative errors.
    """
    ratios = [
        math.log10(measured[step] / expected[step])
        for step in sorted(measured.keys() & expected.keys())
        if measured[step] > 0.0 and expected[step] > 0.0
    ]
    return sum(ratios) / len(ratios) if ratios else 0.0
