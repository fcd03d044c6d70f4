"""Spectrum: forecasts of a network's activations along the denoising trajectory. Pure torch and numpy."""

from spectrum.chebyshev import chebyshev_basis, ridge_weights
from spectrum.forecaster import Forecaster
from spectrum.predictor import Blend, ChebyshevRidge, LinearExtrapolation, Predictor
from spectrum.schedule import FixedSchedule, Schedule, StepKind, paper_schedule

__all__ = [
    "Blend",
    "ChebyshevRidge",
    "FixedSchedule",
    "Forecaster",
    "LinearExtrapolation",
    "Predictor",
    "Schedule",
    "StepKind",
    "chebyshev_basis",
    "paper_schedule",
    "ridge_weights",
]
