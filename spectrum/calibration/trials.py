"""Trials: calibration videos made again with what was planned from all the others, and what they predict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

LEAST_TRIALS = 6  # with fewer, the uncertainty is unknown


class Tried(Protocol):
    """A trial, as far as predictions depend on it."""

    @property
    def expected(self) -> float:
        """Expected relative error of the latent."""
        ...

    @property
    def surprise(self) -> float:
        """How much worse the forecasts were than expected; see `spectrum.surprise`."""
        ...

    @property
    def psnr(self) -> float:
        """PSNR of the frames, dB."""
        ...


@dataclass(frozen=True, slots=True)
class Prediction:
    """Predicted PSNR against the full sampler, dB; `deviation` is one standard deviation over the trials."""

    psnr: float
    deviation: float


def predict(trials: Sequence[Tried], rows: Sequence[Sequence[float]], point: Sequence[float]) -> Prediction:
    """Predict a PSNR by a linear fit to trials.

    Args:
        trials: the trials.
        rows: variables of each trial.
        point: variables of what is predicted.
    """
    psnrs, variables = np.array([trial.psnr for trial in trials]), np.array(rows)
    line = np.linalg.lstsq(variables, psnrs, rcond=None)[0]
    residuals = psnrs - variables @ line
    deviation = math.sqrt(float(np.square(residuals).sum()) / max(len(psnrs) - len(point), 1))
    return Prediction(float(np.asarray(point) @ line), deviation)


def predict_error(
    trials: Sequence[Tried], expected: float, surprise: float | None = None
) -> Prediction | None:
    """Predict the PSNR from an expected relative error of the latent; None with too few trials.

    It is a linear fit to the trials, with `surprise` as a second variable once that is known.
    """
    if expected <= 0.0 or len(trials) < LEAST_TRIALS:
        return None
    told = [trial for trial in trials if trial.expected > 0.0]
    used = 2 if surprise is None else 3
    rows = [[1.0, math.log10(trial.expected), trial.surprise][:used] for trial in told]
    return predict(told, rows, [1.0, math.log10(expected), surprise or 0.0][:used])


def tail(trials: Sequence[Tried]) -> float | None:
    """10th percentile of the trials' PSNR, dB; None with too few."""
    if len(trials) < LEAST_TRIALS:
        return None
    return float(np.percentile([trial.psnr for trial in trials], 10))
