"""A fitted solver, with forecasts of what it will meet at its nodes, which tell how unusual a video is.

Legend: N nodes; W values per node.
"""

from __future__ import annotations

from dataclasses import dataclass

from spectrum.planner import PlannedSteps
from spectrum.solver.multistep import Multistep, Row


@dataclass(frozen=True, slots=True, eq=False)
class FittedSolver:
    """A solver whose coefficients were fitted to a model.

    Attributes:
        solver: its coefficients.
        forecasts: coefficients of the guided velocity at the nodes 1 … N − 1, each from the noise and the
            values of the nodes before: the one of node k is `[1 + W k]`.
        expected: relative error that each of these forecasts had on videos it was not fitted to.
        error: relative error of the results on such videos.

    Raises:
        ValueError: the shapes do not fit.
    """

    solver: Multistep
    forecasts: tuple[Row, ...]
    expected: tuple[float, ...]
    error: float = 0.0

    def __post_init__(self) -> None:
        sizes = [1 + self.solver.width * k for k in range(1, self.solver.nfe)]
        if [len(row) for row in self.forecasts] != sizes or len(self.expected) != len(sizes):
            raise ValueError(f"a solver of {self.solver.nfe} nodes needs forecasts of {sizes} numbers")

    def steps(self, steps: int) -> PlannedSteps:
        """Its nodes as a plan of a sampler with `steps` steps; errors are known at nodes alone."""
        errors = dict(zip(self.solver.nodes[1:], self.expected, strict=True))
        return PlannedSteps(
            steps, self.solver.nodes, self.error, tuple(errors.get(step) for step in range(steps))
        )
