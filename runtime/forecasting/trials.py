"""Trials: calibration videos made again with forecasts planned or solvers fitted from all the others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from runtime.request.bounds import NUMBER

Positive = Annotated[float, Field(gt=0, le=1e12, allow_inf_nan=False), NUMBER]
Finite = Annotated[float, Field(ge=-1e12, le=1e12, allow_inf_nan=False), NUMBER]
Share = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False), NUMBER]
Count = Annotated[int, Field(ge=0, le=10**9), NUMBER]
LEAST_TRIALS = 6  # with fewer, the uncertainty is unknown


class FilePart(BaseModel):
    """Part of a calibration file; unknown fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Trial(FilePart):
    """A calibration video, made again with what was planned or fitted from the other calibration videos.

    Attributes:
        video: number of the video.
        nfe: number of computed steps.
        expected: expected relative error of the latent.
        surprise: how much worse the forecasts were than expected (`spectrum.surprise`).
        measured: measured relative error of the latent.
        psnr: PSNR of the frames, dB.
    """

    video: Count
    nfe: Count
    expected: Share
    surprise: Finite
    measured: Share
    psnr: Finite


@dataclass(frozen=True, slots=True)
class Prediction:
    """Predicted PSNR against the full sampler, dB; `deviation` is one standard deviation over the trials."""

    psnr: float
    deviation: float


def predict(trials: Sequence[Trial], rows: Sequence[Sequence[float]], point: Sequence[float]) -> Prediction:
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


def tail(trials: Sequence[Trial]) -> float | None:
    """10th percentile of the trials' PSNR, dB; None with too few."""
    if len(trials) < LEAST_TRIALS:
        return None
    return float(np.percentile([trial.psnr for trial in trials], 10))
