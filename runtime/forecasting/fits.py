"""Fits: solvers of a calibration, one for each number of computed steps that they were fitted for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Annotated

import numpy as np
from pydantic import Field, model_validator

from runtime.forecasting.expectation import Expectation
from runtime.forecasting.trials import Count, FilePart, Finite, Share, Trial
from spectrum import surprise
from spectrum.calibration import LEAST_TRIALS, Prediction, predict, tail
from spectrum.solver import FittedSolver, Multistep

_Rows = list[list[Finite]]


class Fit(FilePart):
    """A solver for one number of computed steps, with what it did on videos that it was not fitted to.

    Attributes:
        nodes: its computed steps.
        rows: coefficients of its states after the first, y_1 … y_N; see `spectrum.solver.Multistep`.
        forecasts, expected: see `spectrum.solver.FittedSolver`.
        power: power of the sensitivities with which the nodes were chosen; None for the steps of the plan.
        passes: number of passes of the fit.
        trials: calibration videos, each made by coefficients that were fitted to all others.
    """

    nodes: Annotated[list[Count], Field(min_length=1)]
    rows: _Rows
    forecasts: _Rows
    expected: list[Share]
    power: Share | None
    passes: Annotated[Count, Field(ge=1)]
    trials: list[Trial]

    @model_validator(mode="after")
    def _whole(self) -> Fit:
        self.fitted  # noqa: B018  (raises a ValueError if something is missing)
        return self

    @property
    def nfe(self) -> int:
        """Number of computed steps."""
        return len(self.nodes)

    @cached_property
    def fitted(self) -> FittedSolver:
        """The solver."""
        rows = tuple(np.array(row) for row in [[1.0], *self.rows])
        width = max((len(rows[1]) - 1 if len(rows) > 1 else 1), 1)
        squares = [trial.measured**2 for trial in self.trials]
        error = math.sqrt(sum(squares) / len(squares)) if squares else 0.0
        forecasts = tuple(np.array(row) for row in self.forecasts)
        return FittedSolver(Multistep(tuple(self.nodes), rows, width), forecasts, tuple(self.expected), error)

    @property
    def branches(self) -> int:
        """Number of values that the model gives at each node: 2 if its branches are apart."""
        return self.fitted.solver.width

    @property
    def tail(self) -> float | None:
        """10th percentile of the trials' PSNR, dB; None with too few."""
        return tail(self.trials)

    @property
    def of_nodes(self) -> dict[int, float]:
        """Expected error of each forecast, by its node's step."""
        return dict(zip(self.nodes[1:], self.expected, strict=True))

    def predict(self, surprise: float | None = None) -> Prediction | None:
        """Predict the PSNR of a video; None with too few trials.

        Args:
            surprise: how much worse forecasts were than expected, once that is known.
        """
        if len(self.trials) < LEAST_TRIALS:
            return None
        used = 1 if surprise is None else 2
        rows = [[1.0, trial.surprise][:used] for trial in self.trials]
        return predict(self.trials, rows, [1.0, surprise or 0.0][:used])

    def expectation(self, errors: Mapping[int, float], known: Expectation) -> Expectation:
        """Add the expected quality of a video that this solver made, or will make.

        Args:
            errors: node's step → measured error of its forecast; empty before the video is made.
            known: what is known already.
        """
        prediction = self.predict(surprise(dict(errors), self.of_nodes) if errors else None)
        known = replace(known, errors=self.of_nodes)
        if prediction is None:
            return known
        return replace(known, psnr=prediction.psnr, deviation=prediction.deviation)
