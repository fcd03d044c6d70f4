"""Multistep solvers: every state is a weighted sum of the noise and of all values computed so far.

    y_k = α_k x₀ + Σ_{j<k} (p_kj u_j + q_kj g_j),   k = 0 … N,   y_N the result

x₀ is the noise, u_j and g_j are what the model gave at node j: the unconditional velocity, and the
conditional one minus it. Every predictor–corrector method with fixed coefficients is of this form. As a state
does not build on the one before, each new value corrects all gaps before it, and steps between nodes need
nothing.

Legend: n sampler steps; N nodes, the steps at which the model is computed; W values per node (2 for branches
apart, 1 for the guided velocity or a model without guidance).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from spectrum.predictor import Predictor, latest_weights

if TYPE_CHECKING:  # it takes seconds
    import torch

Row = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Multistep:
    """Coefficients of one solver.

    Attributes:
        nodes: computed steps, ascending, the first of which is 0.
        rows: coefficients of y_0 … y_N: row k is `[1 + W k]`, of x₀ and then of each node's values.
        width: values per node, W.

    Raises:
        ValueError: the nodes do not ascend from 0, or a row is too long, too short or not finite.
    """

    nodes: tuple[int, ...]
    rows: tuple[Row, ...]
    width: int = 1

    def __post_init__(self) -> None:
        if not self.nodes or self.nodes[0] != 0 or any(np.diff(self.nodes) <= 0):
            raise ValueError(f"nodes must ascend from 0, got {list(self.nodes)}")
        sizes = [row.shape for row in self.rows]
        if sizes != [(1 + self.width * k,) for k in range(len(self.nodes) + 1)]:
            raise ValueError(f"{len(self.nodes)} nodes of {self.width} values do not fit rows of {sizes}")
        if not all(np.isfinite(row).all() for row in self.rows):
            raise ValueError("coefficients must be finite")

    @property
    def nfe(self) -> int:
        """Computed transformer evaluations per branch, N."""
        return len(self.nodes)

    def apart(self, scales: Sequence[float]) -> Multistep:
        """Write a solver of the guided velocity u + w g as one of u and g apart, q = w p.

        Args:
            scales: guidance scale w at each node.

        Raises:
            ValueError: the branches are apart already, or a node has no scale.
        """
        if self.width != 1 or len(scales) != len(self.nodes):
            raise ValueError(f"need one value per node and {len(self.nodes)} scales, got {list(scales)}")
        rows = []
        for row in self.rows:
            both = np.stack([row[1:], row[1:] * scales[: len(row) - 1]], axis=1)
            rows.append(np.concatenate([row[:1], both.ravel()]))
        return Multistep(self.nodes, tuple(rows), 2)


def traced(step: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor], steps: int) -> Multistep:
    """Find the coefficients of a sampler by running it on unit vectors.

    Args:
        step: takes the index of a step, a velocity and a state `[1, n + 1]` in float64, and returns the next
            state. It must be linear in all velocities and states so far, as samplers for flow models are.
        steps: number of steps n, each of which becomes a node.
    """
    import torch

    units = torch.eye(steps + 1, dtype=torch.float64)
    state, rows = units[:1], [np.ones(1)]
    for index in range(steps):
        state = step(index, units[index + 1 : index + 2], state).to(torch.float64)
        rows.append(state[0, : index + 2].numpy().copy())
    return Multistep(tuple(range(steps)), tuple(rows))


def skipping(full: Multistep, nodes: Sequence[int], predictor: Predictor) -> Multistep:
    """Coefficients of a sampler that computes only some steps, and forecasts the velocity of the others.

    Args:
        full: the sampler that computes every step, of one value per node.
        nodes: computed steps.
        predictor: weights of the forecasts.

    Raises:
        ValueError: the branches of `full` are apart, or it does not compute every step.
    """
    steps = full.nfe
    if full.width != 1 or full.nodes != tuple(range(steps)):
        raise ValueError("a sampler that skips steps is made of one that computes every step")
    velocities = np.zeros((steps, len(nodes)))
    for step in range(steps):
        history = [node for node in nodes if node <= step]
        if history[-1] == step:
            velocities[step, len(history) - 1] = 1.0
        else:
            velocities[step, : len(history)] = latest_weights(predictor, history, step)
    rows = [np.ones(1)]
    for count, end in enumerate([*nodes[1:], steps], 1):
        row = full.rows[end]
        rows.append(np.concatenate([row[:1], row[1:] @ velocities[:end, :count]]))
    return Multistep(tuple(nodes), tuple(rows))
