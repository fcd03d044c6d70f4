"""UniPC as a table of coefficients, for any noise levels: what a fit starts from where it knows nothing.

Source: UniPC (Zhao et al., arXiv 2302.04867): second order, B(h) = e^h − 1, data prediction, with its
corrector; first order at the beginning and the end. Flow models: x_σ = (1 − σ) x + σ noise.

Legend: σ noise level, α = 1 − σ, λ = log(α / σ); N steps; m = x − σ v, the clean estimate.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from spectrum.solver.multistep import Multistep, Row

_MOST = 1.0 - 1e-6  # of σ: λ would be infinite at pure noise


def unipc(levels: Sequence[float], nodes: Sequence[int]) -> Multistep:
    """Coefficients of UniPC with one step from each node to the next.

    Args:
        levels: σ at each node and at the end, which is 0: `[N + 1]`, descending.
        nodes: the sampler steps that the nodes are.

    Raises:
        ValueError: the levels do not descend to 0, or do not fit the nodes.
    """
    sigmas = np.minimum(np.asarray(levels, dtype=np.float64), _MOST)
    if len(sigmas) != len(nodes) + 1 or sigmas[-1] != 0.0 or (np.diff(sigmas) >= 0.0).any():
        raise ValueError(f"{len(nodes)} nodes need noise levels that descend to 0, got {list(levels)}")
    return _UniPC(sigmas).multistep(tuple(nodes))


class _UniPC:
    """One run on unit vectors."""

    def __init__(self, sigmas: NDArray[np.float64]):
        self._sigmas = sigmas
        with np.errstate(divide="ignore"):
            self._lambdas = np.log1p(-sigmas) - np.log(sigmas)
        self._clean: list[Row] = []

    def multistep(self, nodes: tuple[int, ...]) -> Multistep:
        count = len(nodes)
        units = np.eye(count + 1)
        state, before, order, rows = units[0], units[0], 1, [np.ones(1)]
        for k in range(count):
            self._clean.append(state - self._sigmas[k] * units[k + 1])
            corrected = self._correct(k, before, order) if k else state
            order = min(2, count - k, k + 1)
            before, state = corrected, self._predict(k, corrected, order)
            rows.append(state[: k + 2])
        return Multistep(nodes, tuple(rows))

    def _predict(self, k: int, state: Row, order: int) -> Row:
        """State at level k + 1 from the corrected one at level k."""
        moved, gain, length = self._base(k, state)
        if order == 1:
            return moved
        ratio = (self._lambdas[k - 1] - self._lambdas[k]) / length
        slope: Row = (self._clean[k - 1] - self._clean[k]) / ratio
        return moved + 0.5 * gain * slope

    def _correct(self, k: int, before: Row, order: int) -> Row:
        """State at level k from the corrected one at level k − 1, once the value at k is known."""
        moved, gain, length = self._base(k - 1, before)
        newest = self._clean[k] - self._clean[k - 1]
        if order == 1:
            return moved + 0.5 * gain * newest
        ratio = (self._lambdas[k - 2] - self._lambdas[k - 1]) / length
        first = np.expm1(-length) / -length - 1.0
        second = first / -length - 0.5
        system = np.array([[1.0, 1.0], [ratio, 1.0]])
        shares = np.linalg.solve(system, np.array([first, 2.0 * second]) / np.expm1(-length))
        slope = (self._clean[k - 2] - self._clean[k - 1]) / ratio
        corrected: Row = moved + gain * (shares[0] * slope + shares[1] * newest)
        return corrected

    def _base(self, k: int, state: Row) -> tuple[Row, float, float]:
        """First-order step from level k to k + 1, the factor α (1 − e^−h) of what is added to it, and h."""
        length = float(self._lambdas[k + 1] - self._lambdas[k])
        gain = float((1.0 - self._sigmas[k + 1]) * -np.expm1(-length))
        moved: Row = self._sigmas[k + 1] / self._sigmas[k] * state + gain * self._clean[k]
        return moved, gain, length
