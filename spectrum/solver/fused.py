"""A sampler fused with the forecasts of the steps that it skips: coefficients alone, decided step by step.

A forecast is a weighted sum of computed velocities, and a sampler for flow models is linear in its
velocities, so every state is one weighted sum of the noise and the computed velocities, whichever steps turn
out to be computed. `skipping` gives these coefficients for steps that are known beforehand.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from spectrum.predictor import Predictor, latest_weights
from spectrum.solver.multistep import Multistep, Row


class FusedSampler:
    """Coefficients of one generation's states, from the first step on.

    Args:
        full: the sampler that computes every step, of one value per node.
        predictor: weights of the forecasts.

    Raises:
        ValueError: the branches of `full` are apart, or it does not compute every step.

    Example:
        >>> from spectrum import LinearExtrapolation
        >>> from spectrum.solver import unipc
        >>> fused = FusedSampler(unipc([1.0, 0.75, 0.5, 0.25, 0.0], range(4)), LinearExtrapolation())
        >>> fused.compute()
        >>> fused.forecast()
        >>> fused.compute()
        >>> fused.nodes, fused.step, len(fused.state())
        ([0, 2], 3, 3)
    """

    def __init__(self, full: Multistep, predictor: Predictor):
        if full.width != 1 or full.nodes != tuple(range(full.nfe)):
            raise ValueError("a sampler that skips steps is made of one that computes every step")
        self._full, self._predictor = full, predictor
        self._velocities = np.zeros((full.nfe, full.nfe))  # of each step, in terms of the nodes'
        self._first = 0  # of the nodes that are remembered
        self.nodes: list[int] = []
        self.step = 0

    @property
    def steps(self) -> int:
        """Number of sampler steps n."""
        return self._full.nfe

    @property
    def remembers(self) -> bool:
        """Whether there is a node from which the current step can be forecast."""
        return len(self.nodes) > self._first

    def forget(self) -> None:
        """Use no node so far for later forecasts, as another expert takes over."""
        self._first = len(self.nodes)

    def compute(self) -> None:
        """Take the current step as one whose velocity is computed: it becomes a node."""
        self._velocities[self.step, len(self.nodes)] = 1.0
        self.nodes.append(self.step)
        self.step += 1

    def forecast(self) -> None:
        """Take the current step on a forecast.

        Raises:
            ValueError: there is nothing to forecast it from.
        """
        self._velocities[self.step, : len(self.nodes)] = self.weights()
        self.step += 1

    def weights(self) -> Row:
        """Coefficients `[N]` of the forecast of the current step, of the N nodes so far.

        Raises:
            ValueError: there is nothing to forecast it from.
        """
        history: Sequence[int] = self.nodes[self._first :]
        if not history:
            raise ValueError(f"no value was recorded to forecast step {self.step} from")
        weights = np.zeros(len(self.nodes))
        weights[self._first :] = latest_weights(self._predictor, history, self.step)
        return weights

    def state(self) -> Row:
        """Coefficients `[1 + N]` of the state before the current step, of noise and nodes so far."""
        row = self._full.rows[self.step]
        return np.concatenate([row[:1], row[1:] @ self._velocities[: self.step, : len(self.nodes)]])
