"""Trajectory: the noise and the values computed so far, from which a solver makes its states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from spectrum.forecaster import Squares
from spectrum.solver.multistep import Multistep, Row
from spectrum.storage import kept, placed
from spectrum.weighted import weighted_sum


class Trajectory:
    """One generation by a solver. Values are kept in float32, and must not be written to afterwards.

    Args:
        solver: its coefficients.
        start: the noise x₀, float32.
        storage: device on which noise and values are kept; by default that of the noise.

    Example:
        >>> import numpy as np
        >>> euler = Multistep((0,), (np.ones(1), np.array([1.0, -1.0])))
        >>> one = Trajectory(euler, torch.tensor([3.0]))
        >>> one.record([torch.tensor([2.0])])
        >>> one.state()
        tensor([1.])
    """

    def __init__(self, solver: Multistep, start: torch.Tensor, storage: torch.device | None = None):
        self.solver, self._device, self._storage = solver, start.device, storage
        self._values = [kept(start.float(), storage)]

    @property
    def node(self) -> int:
        """Number of nodes whose values are known, k: the next state is y_k."""
        return (len(self._values) - 1) // self.solver.width

    @property
    def bytes(self) -> int:
        """Memory held by the noise and the values, in bytes."""
        return sum(value.numel() * value.element_size() for value in self._values)

    def record(self, values: Sequence[torch.Tensor]) -> None:
        """Add the values computed at the next node.

        Raises:
            ValueError: there is no such node, or there are too few or too many values.
        """
        if self.node >= self.solver.nfe or len(values) != self.solver.width:
            raise ValueError(
                f"{len(values)} values at node {self.node}; the solver has {self.solver.nfe} nodes of "
                f"{self.solver.width}"
            )
        self._values += [kept(value.detach().float(), self._storage) for value in values]

    def state(self, node: int | None = None) -> torch.Tensor:
        """State y_k, float32, by default the newest."""
        return self.combine(self.solver.rows[self.node if node is None else node])

    def combine(self, row: Row) -> torch.Tensor:
        """Weighted sum of the noise and the first values: float64 coefficients, accumulated in float32."""
        return weighted_sum(row.tolist(), self._values[: len(row)], self._device)

    def squared_error(self, row: Row, truth: torch.Tensor) -> Squares:
        """Squared error of `combine(row)` as an estimate of `truth`."""
        difference = self.combine(row).sub_(truth.float())
        return Squares(difference.square_().sum().double(), truth.float().square().sum().double())

    def values(self, node: int) -> list[torch.Tensor]:
        """Values of a node, where they are kept."""
        first = 1 + node * self.solver.width
        return self._values[first : first + self.solver.width]

    def load(self, values: Mapping[int, Sequence[torch.Tensor]]) -> None:
        """Replace the values by those of the nodes 0, 1 … of an earlier trajectory."""
        del self._values[1:]
        for node in sorted(values):
            self._values += [placed(value, self._storage, self._device) for value in values[node]]
