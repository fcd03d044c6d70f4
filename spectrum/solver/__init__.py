"""Solvers given as tables of numbers, and how such a table is fitted to a model."""

from spectrum.solver.fitted import FittedSolver
from spectrum.solver.multistep import Multistep, Row, skipping, traced
from spectrum.solver.nodes import NodePlanner
from spectrum.solver.regression import Moments, Regression, moments_of, regress
from spectrum.solver.trajectory import Trajectory
from spectrum.solver.unipc import unipc

__all__ = [
    "FittedSolver",
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
