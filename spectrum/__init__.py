"""Spectrum: forecasts of a network's activations along the denoising trajectory. Pure torch and numpy."""

from spectrum.calibrated import CalibratedPredictor, Gram, mean_gram, surprise
from spectrum.chebyshev import chebyshev_basis, ridge_weights
from spectrum.forecaster import Forecaster, SquaredError, Squares
from spectrum.guard import GuardedSchedule
from spectrum.pace import Pace
from spectrum.planner import MAX_STEPS, PlannedSteps, Planner
from spectrum.predictor import Blend, ChebyshevRidge, LinearExtrapolation, Predictor
from spectrum.schedule import (
    NOWHERE,
    AdaptiveSchedule,
    ErrorSchedule,
    FixedSchedule,
    Schedule,
    StepKind,
    paper_schedule,
)
from spectrum.seconds import StepSeconds, Stopwatch, TimeLeft
from spectrum.track import Advanced, Track

__all__ = [
    "MAX_STEPS",
    "NOWHERE",
    "AdaptiveSchedule",
    "Advanced",
    "Blend",
    "CalibratedPredictor",
    "ChebyshevRidge",
    "ErrorSchedule",
    "FixedSchedule",
    "Forecaster",
    "Gram",
    "GuardedSchedule",
    "LinearExtrapolation",
    "Pace",
    "PlannedSteps",
    "Planner",
    "Predictor",
    "Schedule",
    "SquaredError",
    "Squares",
    "StepKind",
    "StepSeconds",
    "Stopwatch",
    "TimeLeft",
    "Track",
    "chebyshev_basis",
    "mean_gram",
    "paper_schedule",
    "ridge_weights",
    "surprise",
]
