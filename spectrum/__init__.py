"""Spectrum: forecasts of a network's activations along the denoising trajectory. Pure torch and numpy."""

from spectrum.chebyshev import chebyshev_basis, ridge_weights
from spectrum.forecaster import Forecaster, SquaredError
from spectrum.predictor import Blend, ChebyshevRidge, LinearExtrapolation, Predictor
from spectrum.schedule import (
    AdaptiveSchedule,
    ErrorSchedule,
    FixedSchedule,
    Schedule,
    StepKind,
    paper_schedule,
)

__all__ = [
    "AdaptiveSchedule",
    "Blend",
    "ChebyshevRidge",
    "ErrorSchedule",
    "FixedSchedule",
    "Forecaster",
    "LinearExtrapolation",
    "Predictor",
    "Schedule",
    "SquaredError",
    "StepKind",
    "chebyshev_basis",
    "paper_schedule",
    "ridge_weights",
]
