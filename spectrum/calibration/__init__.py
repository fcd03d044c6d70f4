"""Calibration of any model and sampler: what is measured, what follows from it, and when it is valid.

An integration makes runs and hands over what it saw; everything else is here, so that a calibration means the
same whoever made it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from spectrum.calibration.findings import (
    LEAST_STEPS,
    LEAST_VIDEOS,
    SCHEMA,
    Findings,
    nudged_steps,
    trial_budgets,
)
from spectrum.calibration.measured import Measured, from_triangle, make_planner, to_triangle
from spectrum.calibration.trials import LEAST_TRIALS, Prediction, Tried, predict, tail
from spectrum.calibration.validity import differences, sizes_differ

if TYPE_CHECKING:  # they import torch, which takes seconds
    from spectrum.calibration.probing import gram_of, norm, nudge, sample

_WITH_TORCH = dict.fromkeys(("gram_of", "norm", "nudge", "sample"), "probing")

__all__ = [
    "LEAST_STEPS",
    "LEAST_TRIALS",
    "LEAST_VIDEOS",
    "SCHEMA",
    "Findings",
    "Measured",
    "Prediction",
    "Tried",
    "differences",
    "from_triangle",
    "gram_of",
    "make_planner",
    "norm",
    "nudge",
    "nudged_steps",
    "predict",
    "sample",
    "sizes_differ",
    "tail",
    "to_triangle",
    "trial_budgets",
]


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is asked for."""
    if name in _WITH_TORCH:
        return getattr(import_module(f"spectrum.calibration.{_WITH_TORCH[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
