"""Spectrum: forecasts of a network's activations along the denoising trajectory. Pure torch and numpy."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from spectrum.calibrated import CalibratedPredictor, Gram, mean_gram, surprise
from spectrum.chebyshev import chebyshev_basis, ridge_weights
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

if TYPE_CHECKING:  # they import torch, which takes seconds
    from spectrum.forecaster import Forecaster, SquaredError, Squares
    from spectrum.track import Advanced, Track

_WITH_TORCH = {
    **dict.fromkeys(("Forecaster", "SquaredError", "Squares"), "forecaster"),
    **dict.fromkeys(("Advanced", "Track"), "track"),
}

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


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is asked for."""
    if name in _WITH_TORCH:
        return getattr(import_module(f"spectrum.{_WITH_TORCH[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
