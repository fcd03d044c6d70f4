"""Solvers given as tables of numbers, and how such a table is fitted to a model."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from spectrum.solver.fitted import FittedSolver
from spectrum.solver.fused import FusedSampler
from spectrum.solver.multistep import Multistep, Row, skipping, traced
from spectrum.solver.nodes import NodePlanner
from spectrum.solver.unipc import unipc

if TYPE_CHECKING:  # they import torch, which takes seconds
    from spectrum.solver.regression import Moments, Regression, moments_of, regress
    from spectrum.solver.trajectory import Trajectory

_WITH_TORCH = {
    **dict.fromkeys(("Moments", "Regression", "moments_of", "regress"), "regression"),
    "Trajectory": "trajectory",
}

__all__ = [
    "FittedSolver",
    "FusedSampler",
    "Moments",
    "Multistep",
    "NodePlanner",
    "Regression",
    "Row",
    "Trajectory",
    "moments_of",
    "regress",
    "skipping",
    "traced",
    "unipc",
]


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is asked for."""
    if name in _WITH_TORCH:
        return getattr(import_module(f"spectrum.solver.{_WITH_TORCH[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
