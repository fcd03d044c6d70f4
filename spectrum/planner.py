"""Planner: which steps to compute, as the exact optimum of the result's expected error.

A run of forecast steps between the computed steps b and c leaves the error Σ_t Δσ_t (f_t − forecast_t) in the
latent; the sampler carries the error of step t to its end A_t times its size. With the Gram matrix of the
stream the expected square of it is known for every gap (a, b, c), a being the computed step before b. Gaps
are taken to be independent, so the best schedule of N computed steps is a shortest path over pairs of steps.

Legend: n sampler steps; a < b < c successive computed steps; A_t sensitivity; Δσ_t step of the noise level.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from spectrum.calibrated import CalibratedPredictor, moved

MAX_STEPS = 200


@dataclass(frozen=True, slots=True)
class PlannedSteps:
    """A planned schedule and the errors expected of it.

    Attributes:
        steps: number of sampler steps n.
        computed: computed steps, ascending.
        error: expected size of the result's error, in units of the stream's root mean square.
        errors: expected relative error of a forecast at every step: of the forecast that is made, or at a
            computed step of the one that would have been. None at step 0.
    """

    steps: int
    computed: tuple[int, ...]
    error: float
    errors: tuple[float | None, ...]

    @property
    def nfe(self) -> int:
        """Computed transformer evaluations per branch."""
        return len(self.computed)

    @property
    def expected(self) -> dict[int, float]:
        """Expected error of the forecast that each computed step replaces, by step."""
        return {step: error for step in self.computed if (error := self.errors[step]) is not None}


class Planner:
    """Plans schedules for one stream and one sampler.

    Args:
        predictor: predictor with the stream's Gram matrix, of trace n.
        weights: effect on the result of an error of the stream at each step, A_t Δσ_t: `[n]`.

    Raises:
        ValueError: the shapes do not fit, or there are more than 200 steps.
    """

    def __init__(self, predictor: CalibratedPredictor, weights: Sequence[float]):
        self._predictor = predictor
        self._weights = np.asarray(weights, dtype=np.float64)
        self._steps = len(predictor.gram)
        if self._weights.shape != (self._steps,) or not np.isfinite(self._weights).all():
            raise ValueError(f"need one finite weight for each of {self._steps} steps, got {weights}")
        if self._steps > MAX_STEPS:
            raise ValueError(f"plans are made for at most {MAX_STEPS} steps, got {self._steps}")

    def plan(self, nfe: int) -> PlannedSteps:
        """Best schedule with `nfe` computed steps; ties are broken deterministically.

        Raises:
            ValueError: `nfe` is not within 1 … n.
        """
        if not 1 <= nfe <= self._steps:
            raise ValueError(f"nfe must be within 1 … {self._steps}, got {nfe}")
        return self.price(self._path(nfe))

    def price(self, computed: Sequence[int]) -> PlannedSteps:
        """Expected errors of any schedule that begins with step 0."""
        squares = [self._first[computed[1] if len(computed) > 1 else self._steps]]
        ends = [*computed[2:], self._steps]
        squares += [self._costs[a, b, c] for a, b, c in zip(computed, computed[1:], ends, strict=False)]
        return PlannedSteps(
            self._steps, tuple(computed), math.sqrt(float(sum(squares))), tuple(self._errors(computed))
        )

    def _errors(self, computed: Sequence[int]) -> list[float | None]:
        errors: list[float | None] = [None]
        for step in range(1, self._steps):
            history = [c for c in computed if c < step][-2:]
            errors.append(self._predictor.error(history, step))
        return errors

    def _path(self, nfe: int) -> list[int]:
        """Shortest path over pairs (a, b): `best[a, b]` is the least cost of the gaps up to b."""
        n = self._steps
        if nfe == 1:
            return [0]
        best = np.full((n, n), np.inf)
        best[0, 1:] = self._first[1:n]
        before: list[NDArray[np.intp]] = []
        for _ in range(nfe - 2):
            totals = best[:, :, None] + self._costs[:, :, :n]
            before.append(totals.argmin(axis=0))
            best = totals.min(axis=0)
        totals = best + self._costs[:, :, n]
        a, b = np.unravel_index(int(totals.argmin()), totals.shape)
        path = [int(b), int(a)]
        for choice in reversed(before):
            path.append(int(choice[path[-1], path[-2]]))
        return path[::-1]

    @cached_property
    def _first(self) -> NDArray[np.float64]:
        """Cost of forecasting steps 1 … c − 1 from step 0 alone, for c = 0 … n."""
        return self._gap_costs(moved(self._predictor.gram, 0), 0)

    @cached_property
    def _costs(self) -> NDArray[np.float64]:
        """Cost of every gap (a, b, c), where c = n is the end; infinite unless a < b < c."""
        n = self._steps
        costs = np.full((n, n, n + 1), np.inf)
        for b in range(1, n):
            shifted = moved(self._predictor.gram, b)
            for a in range(b):
                slopes = self._predictor.slopes(a, b)
                cross = np.outer(slopes, shifted[a])
                residual = shifted + cross + cross.T + np.outer(slopes, slopes) * shifted[a, a]
                costs[a, b, b + 1 :] = self._gap_costs(residual, b)[b + 1 :]
        return costs

    def _gap_costs(self, residual: NDArray[np.float64], b: int) -> NDArray[np.float64]:
        """Costs ‖Σ_t weight_t r_t‖² over b < t < c, for c = 0 … n, from ⟨r_t, r_u⟩."""
        weights = np.where(np.arange(self._steps) > b, self._weights, 0.0)
        sums = (residual * np.outer(weights, weights)).cumsum(axis=0).cumsum(axis=1)
        costs: NDArray[np.float64] = np.maximum(np.concatenate([[0.0], sums.diagonal()]), 0.0)
        return costs
