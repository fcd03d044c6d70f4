"""Planner: which steps to compute, as the exact optimum of the result's expected error.

A run of forecast steps between the computed steps b and c leaves the error Σ_t Δσ_t (f_t − forecast_t) in the
latent; the sampler carries the error of step t to its end A_t times its size. With the Gram matrix of the
stream the expected square of it is known for every gap (a, b, c), a being the computed step before b. Gaps
are taken to be independent, so the best schedule of N computed steps is a shortest path over pairs of steps.
Where a history begins anew, as another expert takes over, a path ends and another begins; the computed steps
are distributed over the paths so that the sum is least.

Legend: n sampler steps; a < b < c successive computed steps; A_t sensitivity; Δσ_t step of the noise level.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from spectrum.calibrated import CalibratedPredictor, moved
from spectrum.schedule import NOWHERE, stretches

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


class _Stretch(NamedTuple):
    """Steps with a history of their own, the first `leading` of which are computed."""

    start: int
    end: int
    leading: int

    @property
    def least(self) -> int:
        """Least number of its computed steps."""
        return min(max(self.leading, 1), self.end - self.start)


class Planner:
    """Plans schedules for one stream and one sampler.

    Args:
        predictor: predictor with the stream's Gram matrix, of trace n.
        weights: effect on the result of an error of the stream at each step, A_t Δσ_t: `[n]`.
        fresh: step before which the history is dropped → steps that are computed from there on.

    Raises:
        ValueError: the shapes do not fit, or there are more than 200 steps.
    """

    def __init__(
        self, predictor: CalibratedPredictor, weights: Sequence[float], fresh: Mapping[int, int] = NOWHERE
    ):
        self._predictor = predictor
        self._weights = np.asarray(weights, dtype=np.float64)
        self._steps = len(predictor.gram)
        if self._weights.shape != (self._steps,) or not np.isfinite(self._weights).all():
            raise ValueError(f"need one finite weight for each of {self._steps} steps, got {weights}")
        if self._steps > MAX_STEPS:
            raise ValueError(f"plans are made for at most {MAX_STEPS} steps, got {self._steps}")
        self._stretches = [_Stretch(*one) for one in stretches(self._steps, {0: 1, **fresh})]

    @property
    def least(self) -> int:
        """Least number of computed steps: those that begin a history."""
        return sum(one.least for one in self._stretches)

    def plan(self, nfe: int) -> PlannedSteps:
        """Best schedule with `nfe` computed steps; ties are broken deterministically.

        Raises:
            ValueError: `nfe` is not within `least` … n.
        """
        if not self.least <= nfe <= self._steps:
            raise ValueError(f"nfe must be within {self.least} … {self._steps}, got {nfe}")
        return self.price(self._shortest(nfe))

    def price(self, computed: Sequence[int]) -> PlannedSteps:
        """Expected errors of any schedule that begins every history with a computed step."""
        squares: list[float] = []
        for one in self._stretches:
            own = [step for step in computed if one.start <= step < one.end]
            squares.append(self._first[one.start, own[1] if len(own) > 1 else one.end])
            ends = [*own[2:], one.end]
            squares += [self._costs[a, b, c] for a, b, c in zip(own, own[1:], ends, strict=False)]
        return PlannedSteps(
            self._steps, tuple(computed), math.sqrt(float(sum(squares))), tuple(self._errors(computed))
        )

    def _errors(self, computed: Sequence[int]) -> list[float | None]:
        errors: list[float | None] = []
        for one in self._stretches:
            errors.append(None)
            for step in range(one.start + 1, one.end):
                history = [c for c in computed if one.start <= c < step][-2:]
                errors.append(self._predictor.error(history, step))
        return errors

    def _shortest(self, nfe: int) -> list[int]:
        """Computed steps of the best distribution of `nfe` over the stretches."""
        best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}  # number of steps → their cost
        for one in self._stretches:
            own = self._paths(one, nfe - (self.least - one.least))
            joined: dict[int, tuple[float, list[int]]] = {}
            for used, (cost, steps) in best.items():
                for count, (more, path) in own.items():
                    total = cost + more
                    if used + count <= nfe and total < joined.get(used + count, (math.inf,))[0]:
                        joined[used + count] = total, steps + path
            best = joined
        return best[nfe][1]

    def _paths(self, one: _Stretch, most: int) -> dict[int, tuple[float, list[int]]]:
        """Cost and steps of the best path through a stretch, for each number of computed steps up to `most`.

        A shortest path over pairs (a, b): `best[a, b]` is the least cost of the gaps up to b.
        """
        start, end, least = one.start, one.end, one.least
        found: dict[int, tuple[float, list[int]]] = {}
        if least == 1:
            found[1] = float(self._first[start, end]), [start]
        best = np.full((end - start, end - start), np.inf)
        if least == 1:
            best[0, 1:] = self._first[start, start + 1 : end]
        else:
            best[least - 2, least - 1] = 0.0
        costs = self._costs[start:end, start:end, start : end + 1]
        before: list[NDArray[np.intp]] = []
        for count in range(max(least, 2), min(most, end - start) + 1):
            if count > max(least, 2):
                totals = best[:, :, None] + costs[:, :, :-1]
                before.append(totals.argmin(axis=0))
                best = totals.min(axis=0)
            ends = best + costs[:, :, -1]
            a, b = np.unravel_index(int(ends.argmin()), ends.shape)
            path = [int(b), int(a)]
            for choice in reversed(before):
                path.append(int(choice[path[-1], path[-2]]))
            path += range(max(least - 2, 0) - 1, -1, -1)
            found[count] = float(ends[a, b]), [start + step for step in reversed(path)]
        return found

    @cached_property
    def _first(self) -> NDArray[np.float64]:
        """Cost of forecasting from step b alone until step c, where c = n is the end: `[n, n + 1]`."""
        return np.stack([self._gap_costs(moved(self._predictor.gram, b), b) for b in range(self._steps)])

    @cached_property
    def _costs(self) -> NDArray[np.float64]:
        """Cost of every gap (a, b, c), where c = n is the end; infinite unless a < b < c.

        A forecast with slope s_t leaves (f_t − f_b) + s_t (f_a − f_b). With S = Σ_t weight_t (f_t − f_b) and
        q = Σ_t weight_t s_t over b < t < c, a gap costs ‖S‖² + 2 q ⟨S, f_a − f_b⟩ + q² ‖f_a − f_b‖².
        """
        n = self._steps
        costs = np.full((n, n, n + 1), np.inf)
        for b in range(1, n):
            shifted, weights = moved(self._predictor.gram, b), self._after(b)[:, None]
            products = (weights * shifted[:, :b]).cumsum(axis=0)
            slopes = (weights * self._predictor.slopes(b)[:, :b]).cumsum(axis=0)
            gaps = self._first[b, 1:, None] + 2.0 * slopes * products + slopes**2 * shifted.diagonal()[:b]
            costs[:b, b, b + 1 :] = np.maximum(gaps[b:].T, 0.0)
        return costs

    def _after(self, b: int) -> NDArray[np.float64]:
        """Weights of the steps after b, and 0 for the others."""
        return np.where(np.arange(self._steps) > b, self._weights, 0.0)

    def _gap_costs(self, residual: NDArray[np.float64], b: int) -> NDArray[np.float64]:
        """Costs ‖Σ_t weight_t r_t‖² over b < t < c, for c = 0 … n, from ⟨r_t, r_u⟩."""
        weights = self._after(b)
        sums = (residual * np.outer(weights, weights)).cumsum(axis=0).cumsum(axis=1)
        costs: NDArray[np.float64] = np.maximum(np.concatenate([[0.0], sums.diagonal()]), 0.0)
        return costs
