"""Choice of a fitted solver's nodes, from Gram matrices alone.

A state that is off does harm only through the values computed there. To first order, the squared error of the
result is therefore

    cost(nodes) = ρ_N² + Σ_{0<k<N} (A^p_{s_k} w_k J_{s_k} ρ_k)²

with ρ_k the part of the full sampler's state at node k that lies outside of the span of the noise and the
velocities at the nodes before, ρ_N that of the result, J_s how much a velocity changes with the state, w_k
half of the two adjacent gaps in σ (all of the one after the last node), and A_s what of a velocity's error is
left at the end.

Legend: n sampler steps; N nodes; s_k the step of node k.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from spectrum.calibrated import Gram
from spectrum.solver.multistep import Multistep

Nodes = tuple[int, ...]

_RIDGE = 1e-5  # of the regressions: true trajectories alone would be extrapolated too boldly
_STARTS, _FINALISTS = 8, 3
_SETTLED = 1e-9  # relative gain below which a search ends


@dataclass(frozen=True, eq=False)
class NodePlanner:
    """Plans nodes for one model and sampler.

    Attributes:
        gram: mean over videos of ⟨·, ·⟩ of (x₀, v_0 … v_{n−1}) of full runs, each divided by the squared norm
            of its result, `[n + 1, n + 1]`.
        full: the full sampler.
        levels: σ of the sampler, `[n + 1]`.
        sensitivity: A, `[n]`.
        response: J, the relative change of the velocity per change of the state, `[n]`.
        power: p, which damps A; 1 puts more nodes early.
        experts: number of the expert of each step, `[n]`, where there are several: each has a node.

    Raises:
        ValueError: the shapes do not fit.
    """

    gram: Gram
    full: Multistep
    levels: Sequence[float]
    sensitivity: Sequence[float]
    response: Sequence[float]
    power: float = 1.0
    experts: Sequence[int] = ()
    _known: dict[tuple[int, ...], float] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        n = self.full.nfe
        lengths = (len(self.gram) - 1, len(self.levels) - 1, len(self.sensitivity), len(self.response))
        if lengths != (n, n, n, n):
            raise ValueError(f"{n} steps do not fit Gram matrix, levels, sensitivity, response of {lengths}")

    @property
    def steps(self) -> int:
        """Number of sampler steps n."""
        return self.full.nfe

    def plan(self, nfe: int) -> Nodes:
        """Find good nodes, by moving one at a time from several deterministic starts.

        From each start, nodes move between their neighbours; those of the best results then move anywhere.

        Raises:
            ValueError: `nfe` is not within 1 … n, or there are more experts.
        """
        least = max(1, len(set(self.experts)))
        if not least <= nfe <= self.steps:
            raise ValueError(f"nfe must be within {least} … {self.steps}, got {nfe}")
        found = {self._improved(start, self._between) for start in self._starts(nfe)}
        best = sorted(found, key=self._rank)[:_FINALISTS]
        return min((self._improved(nodes, self._anywhere) for nodes in best), key=self._rank)

    def _rank(self, nodes: Nodes) -> tuple[float, Nodes]:
        return self.cost(nodes), nodes

    def cost(self, nodes: Sequence[int]) -> float:
        """Expected squared error of the result, relative to its size; infinite if an expert has no node."""
        if len({self.experts[node] for node in nodes} if self.experts else ()) < len(set(self.experts)):
            return math.inf
        n, levels = self.steps, np.asarray(self.levels)
        ends = [*nodes, n]
        total = self._outside(nodes, n)
        for k in range(1, len(nodes)):
            step = ends[k]
            after = (levels[step] - levels[ends[k + 1]]) * (0.5 if k + 1 < len(nodes) else 1.0)
            share = 0.5 * (levels[ends[k - 1]] - levels[step]) + after
            gain = self.sensitivity[step] ** self.power * share * self.response[step]
            total += gain**2 * self._outside(nodes[:k], step)
        return float(total)

    def _outside(self, before: Sequence[int], step: int) -> float:
        """Squared size of the state at `step` outside of the span of noise and values at `before`."""
        key = (*before, step)
        if key not in self._known:
            self._known[key] = self._residual(before, step)
        return self._known[key]

    def _residual(self, before: Sequence[int], step: int) -> float:
        """Squared size of what a regression with a little ridge towards the noise leaves of the state."""
        own = [0, *(1 + node for node in before)]
        gram = self.gram[np.ix_(own, own)]
        change = self._changes[step, own] - gram[0]
        damped = gram + np.diag(_RIDGE * gram.diagonal())
        row = np.linalg.solve(damped, change)
        square = self._sizes[step] - 2.0 * row @ change + row @ gram @ row
        return max(float(square), 0.0)

    @cached_property
    def _states(self) -> NDArray[np.float64]:
        """Coefficients of every state on noise and velocities, `[n + 1, n + 1]`."""
        states = np.zeros((self.steps + 1, self.steps + 1))
        for step, row in enumerate(self.full.rows):
            states[step, : step + 1] = row
        return states

    @cached_property
    def _changes(self) -> NDArray[np.float64]:
        """⟨state, ·⟩ of every state with noise and velocities, `[n + 1, n + 1]`."""
        return self._states @ self.gram

    @cached_property
    def _sizes(self) -> NDArray[np.float64]:
        """Squared size of what every state has more than the noise, `[n + 1]`."""
        moved = self._states.copy()
        moved[:, 0] -= 1.0
        sizes: NDArray[np.float64] = np.einsum("si,ij,sj->s", moved, self.gram, moved)
        return sizes

    def _starts(self, nfe: int) -> list[Nodes]:
        """Draw sets of nodes, denser at early steps, the first of every expert among them."""
        rng = np.random.default_rng(0)
        fixed = {0, *(self.experts.index(number) for number in set(self.experts))}
        free = np.array(sorted(set(range(self.steps)) - fixed), dtype=np.int64)
        count = nfe - len(fixed)
        if count == 0:
            return [tuple(sorted(fixed))]
        odds: NDArray[np.float64] = 1.0 / np.maximum(free, 1) ** 0.7
        odds /= odds.sum()
        return [
            tuple(sorted(fixed | {int(step) for step in rng.choice(free, count, replace=False, p=odds)}))
            for _ in range(_STARTS)
        ]

    def _improved(self, nodes: Nodes, moves: Callable[[Nodes, int], list[Nodes]]) -> Nodes:
        """Move one node after another to where it helps most, until no move helps.

        Args:
            moves: sets of nodes to try instead of `nodes`, in which one node has moved.
        """
        least, moved = self.cost(nodes), True
        while moved:
            moved = False
            for node in range(1, len(nodes)):
                best = min(moves(nodes, node), key=self.cost, default=nodes)
                if self.cost(best) < least * (1.0 - _SETTLED):
                    nodes, least, moved = best, self.cost(best), True
        return nodes

    def _between(self, nodes: Nodes, node: int) -> list[Nodes]:
        end = nodes[node + 1] if node + 1 < len(nodes) else self.steps
        steps = range(nodes[node - 1] + 1, end)
        return [(*nodes[:node], step, *nodes[node + 1 :]) for step in steps if step != nodes[node]]

    def _anywhere(self, nodes: Nodes, node: int) -> list[Nodes]:
        others = {*nodes} - {nodes[node]}
        return [tuple(sorted({*others, step})) for step in range(self.steps) if step not in nodes]
