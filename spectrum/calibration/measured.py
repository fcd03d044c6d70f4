"""Measured: the numbers of a calibration file, and the weights, plans and predictions that follow from them.

Legend: n sampler steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spectrum.calibrated import CalibratedPredictor, Gram
from spectrum.calibration.trials import Prediction, Tried, predict_error
from spectrum.planner import Planner
from spectrum.schedule import NOWHERE


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """How a model's streams move under one sampler, and how errors at each step affect the result.

    Attributes:
        noise_levels: σ of the sampler, `[n + 1]`.
        grams: stream → lower triangle of its mean Gram matrix, row by row; its trace is n.
        trajectory: lower triangle of the mean Gram matrix of the noise and the guided velocities, divided by
            the squared norm of the result, `[n + 1, n + 1]`.
        sensitivity: size of an error in the final latent, relative to its size after each step, `[n]`.
        response: change of the guided velocity per change of the latent at each step, `[n]`.
        scale: root mean square of the guided velocity over that of the final latent.
        trials: videos made with planned schedules.
    """

    noise_levels: Sequence[float]
    grams: Mapping[str, Sequence[float]]
    trajectory: Sequence[float]
    sensitivity: Sequence[float]
    response: Sequence[float]
    scale: float
    trials: Sequence[Tried] = ()

    @property
    def steps(self) -> int:
        """Number of sampler steps n."""
        return len(self.noise_levels) - 1

    def check(self, steps: int) -> None:
        """Refuse numbers that are not those of `steps` steps.

        Raises:
            ValueError: a length does not fit, or a Gram matrix is not one.
        """
        n = steps
        lengths = {name: len(values) for name, values in self.grams.items()}
        if any(length != n * (n + 1) // 2 for length in lengths.values()):
            raise ValueError(f"Gram matrices of {n} steps need {n * (n + 1) // 2} numbers, got {lengths}")
        if not len(self.sensitivity) == len(self.response) == self.steps == n:
            raise ValueError(f"sensitivity, response and noise levels must have {n} steps")
        if len(self.trajectory) != (n + 1) * (n + 2) // 2:
            raise ValueError(f"trajectory: {n} steps need {(n + 1) * (n + 2) // 2} numbers")
        for name, values in self.grams.items():
            sizes = from_triangle(values, n).diagonal()
            if (sizes < 0.0).any() or not sizes.any():
                raise ValueError(f"grams.{name}: the squared size of a step cannot be negative, nor all be 0")

    def gram(self, stream: str) -> Gram:
        """Mean Gram matrix of a stream, `[n, n]`.

        Raises:
            ValueError: the stream was not calibrated.
        """
        if stream not in self.grams:
            raise ValueError(f"this calibration has the streams {', '.join(self.grams)}, not {stream}")
        return from_triangle(self.grams[stream], self.steps)

    def predictor(self, stream: str) -> CalibratedPredictor:
        """Make the calibrated predictor of a stream.

        Raises:
            ValueError: the stream was not calibrated.
        """
        return CalibratedPredictor(self.gram(stream))

    def planner(self, stream: str, fresh: Mapping[int, int] = NOWHERE) -> Planner:
        """Make the planner of a stream, whose expected errors are relative to the final latent.

        Args:
            fresh: step before which the history is dropped → steps that are computed from there on.

        Raises:
            ValueError: the stream was not calibrated.
        """
        return make_planner(self.predictor(stream), self.noise_levels, self.sensitivity, self.scale, fresh)

    def predict(self, expected: float, surprise: float | None = None) -> Prediction | None:
        """Predict the PSNR from an expected relative error of the latent; None with too few trials."""
        return predict_error(self.trials, expected, surprise)


def make_planner(
    predictor: CalibratedPredictor,
    noise_levels: Sequence[float],
    sensitivity: Sequence[float],
    scale: float,
    fresh: Mapping[int, int] = NOWHERE,
) -> Planner:
    """Make a planner whose errors are relative to the final latent."""
    moves = -np.diff(np.asarray(noise_levels))
    return Planner(predictor, (moves * np.asarray(sensitivity) * scale).tolist(), fresh)


def to_triangle(gram: NDArray[np.float64]) -> list[float]:
    """Lower triangle, row by row, to 12 digits: differences of neighbouring steps need most of them."""
    return [float(f"{value:.12g}") for value in gram[np.tril_indices(len(gram))]]


def from_triangle(values: Sequence[float], size: int) -> Gram:
    """Symmetric matrix `[size, size]` of a lower triangle."""
    lower: Gram = np.zeros((size, size))
    lower[np.tril_indices(size)] = values
    return lower + np.tril(lower, -1).T
