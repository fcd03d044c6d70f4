"""Universal forecasts: weights and plans for a model without a calibration, from what others have shown.

How a velocity changes along a trajectory depends on the noise level much more than on the model. The weights
that are best for other models therefore come close to a model's own. Which steps matter differs more, and
follows the noise level only in part: models made for higher resolutions, with a larger shift, decide what a
video shows at higher noise levels, though not by as much as the shift says. So steps of two samplers
correspond half by their noise level and half by their number.

Legend: m, n steps of two samplers; σ noise level, 1 … 0.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from spectrum.calibrated import CalibratedPredictor, Gram, mean_gram
from spectrum.calibration.measured import from_triangle
from spectrum.planner import PlannedSteps, Planner
from spectrum.schedule import NOWHERE

TABLE = Path(__file__).with_name("universal.json")
"""What the examples of `universal` are read from; `scripts/make_universal.py` makes it."""
_FOLLOWED = 0.5  # share of a difference in shift (of its logarithm) that noise levels follow
_CLEAREST, _NOISIEST = 1e-4, 1.0 - 1e-4


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """What was measured of one model and sampler.

    Attributes:
        noise_levels: σ of the sampler, descending, `[m + 1]`.
        gram: Gram matrix of the guided velocity, `[m, m]`.
        sensitivity: size of an error in the result, relative to its size after each step, `[m]`.
    """

    noise_levels: Sequence[float]
    gram: Gram
    sensitivity: Sequence[float]

    def __post_init__(self) -> None:
        m = len(self.noise_levels) - 1
        if m < 2 or self.gram.shape != (m, m) or len(self.sensitivity) != m:
            raise ValueError(
                f"an example of {m} steps needs a Gram matrix and sensitivities of as many, at least 2; "
                f"got {list(self.gram.shape)} and {len(self.sensitivity)}"
            )
        _check(self.noise_levels)
        if not (np.diff(np.asarray(self.noise_levels)) < 0.0).all():
            raise ValueError("an example has no two steps of one noise level")
        if not all(0.0 < value < np.inf for value in self.sensitivity):
            raise ValueError("sensitivities must be finite and above 0")

    def at(self, noise_levels: Sequence[float]) -> tuple[Gram, NDArray[np.float64]]:
        """Gram matrix `[n, n]` and sensitivities `[n]` at the steps of another sampler.

        Velocities between two steps are on the line through them, and later than the last on that through the
        last two. At the example's own noise levels everything is as it was measured.

        Args:
            noise_levels: σ of the other sampler, descending, `[n + 1]`.
        """
        _check(noise_levels)
        own = log_shift(self.noise_levels)
        middle = own + _FOLLOWED * (log_shift(noise_levels) - own)
        there, here = _times(self.noise_levels, own), _times(noise_levels, middle)
        before = np.clip(np.searchsorted(there, here, side="right") - 1, 0, len(there) - 2)
        share = np.maximum((here - there[before]) / (there[before + 1] - there[before]), 0.0)
        weights, rows = np.zeros((len(here), len(there))), np.arange(len(here))
        weights[rows, before], weights[rows, before + 1] = 1.0 - share, share
        sensitivity = np.exp(np.interp(here, there, np.log(self.sensitivity)))
        return weights @ self.gram @ weights.T, sensitivity


@dataclass(frozen=True, slots=True, eq=False)
class Universal:
    """Weights and plans for any sampler, as the mean over examples of different models."""

    examples: tuple[Example, ...]

    def __post_init__(self) -> None:
        if not self.examples:
            raise ValueError("at least one example is needed")

    def predictor(self, noise_levels: Sequence[float]) -> CalibratedPredictor:
        """Make the predictor of the guided velocity, or that of a model without guidance.

        Args:
            noise_levels: σ of the sampler, descending, `[n + 1]`.

        Raises:
            ValueError: these are no noise levels.
        """
        return CalibratedPredictor(mean_gram(one.at(noise_levels)[0] for one in self.examples))

    def planner(self, noise_levels: Sequence[float], fresh: Mapping[int, int] = NOWHERE) -> Planner:
        """Make the planner of that stream. Its errors compare plans, and predict no quality.

        Args:
            noise_levels: σ of the sampler, descending, `[n + 1]`.
            fresh: step before which the history is dropped → steps that are computed from there on.

        Raises:
            ValueError: these are no noise levels, or more than of 200 steps.
        """
        sensitivity = np.mean([one.at(noise_levels)[1] for one in self.examples], axis=0)
        moves = -np.diff(np.asarray(noise_levels, dtype=np.float64))
        return Planner(self.predictor(noise_levels), (moves * sensitivity).tolist(), fresh)


@cache
def universal() -> Universal:
    """Weights and plans from the three models that Lockstep has trained and calibrated."""
    return Universal(tuple(examples().values()))


@cache
def examples() -> dict[str, Example]:
    """Read what was measured of each of these models, by its name."""
    models = json.loads(TABLE.read_text(encoding="utf-8"))["models"]
    return {
        one["model"]: Example(
            one["noise_levels"], from_triangle(one["gram"], len(one["sensitivity"])), one["sensitivity"]
        )
        for one in models
    }


@lru_cache(maxsize=64)
def universal_plan(
    noise_levels: tuple[float, ...], nfe: int, fresh: tuple[tuple[int, int], ...] = ()
) -> PlannedSteps:
    """Plan `nfe` computed steps with `universal`.

    Args:
        noise_levels: σ of the sampler, descending, `[n + 1]`.
        nfe: number of computed steps.
        fresh: steps before which the history is dropped, each with the number of steps computed from there.

    Raises:
        ValueError: it cannot be done in so many steps, or there are too many to plan.
    """
    return _planner(noise_levels, fresh).plan(nfe)


@lru_cache(maxsize=16)
def _planner(noise_levels: tuple[float, ...], fresh: tuple[tuple[int, int], ...]) -> Planner:
    return universal().planner(noise_levels, dict(fresh))


@lru_cache(maxsize=16)
def universal_predictor(noise_levels: tuple[float, ...]) -> CalibratedPredictor:
    """Make the predictor of `universal` for a sampler with these noise levels, `[n + 1]`."""
    return universal().predictor(noise_levels)


def log_shift(noise_levels: Sequence[float]) -> float:
    """Logarithm of a sampler's shift, as its noise level halfway says.

    σ = s τ / (1 + (s − 1) τ) with τ from 1 to 0 in even steps is s / (1 + s) in the middle.

    Args:
        noise_levels: σ, descending, `[n + 1]`.
    """
    odds = _log_odds(noise_levels)
    return float(np.interp((len(odds) - 1) / 2.0, np.arange(len(odds)), odds))


def flow_levels(steps: int, shift: float = 5.0) -> tuple[float, ...]:
    """Noise levels of even steps with a shift: σ = s τ / (1 + (s − 1) τ), `[n + 1]`."""
    even = 1.0 - np.arange(steps + 1) / steps
    return tuple((shift * even / (1.0 + (shift - 1.0) * even)).tolist())


def _times(noise_levels: Sequence[float], log_shift: float) -> NDArray[np.float64]:
    """Time 1 − τ from 0 to 1 at which each step begins under a shift, `[n]`."""
    return 1.0 / (1.0 + np.exp(_log_odds(noise_levels[:-1], 0.0, 1.0) - log_shift))


def _log_odds(
    noise_levels: Sequence[float], least: float = _CLEAREST, most: float = _NOISIEST
) -> NDArray[np.float64]:
    levels = np.clip(np.asarray(noise_levels, dtype=np.float64), least, most)
    with np.errstate(divide="ignore"):
        odds: NDArray[np.float64] = np.log(levels) - np.log1p(-levels)
    return odds


def _check(noise_levels: Sequence[float]) -> None:
    levels = np.asarray(noise_levels, dtype=np.float64)
    if len(levels) < 2 or not (np.diff(levels) <= 0.0).all() or not (levels[-1] >= 0.0 and levels[0] <= 1.0):
        raise ValueError(f"noise levels must descend within 1 … 0, got {levels.round(4).tolist()}")
