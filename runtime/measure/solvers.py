"""Fitting solvers to a model, node after node, on the trajectories that they make themselves.

For each node, all calibration videos go on by coefficients fitted to the other videos, the model is computed
there, and the coefficients of the next node are regressed on what is known by then. A video's trajectory and
result are therefore as good as those of a video that was never seen, and tell what to expect.

Tensor legend: B batch, C, F, H, W latent channels, frames, height and width. N nodes, M videos.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

from runtime.errors import CancelledError
from runtime.measure.session import Session
from runtime.measure.states import StateFiles
from runtime.sampling.commands import Command
from runtime.sampling.coordinator import Coordinator
from runtime.sampling.denoise import StepRecord
from runtime.sampling.evaluator import Evaluator
from runtime.sampling.run import Run
from spectrum import FixedSchedule, Gram, StepKind, surprise
from spectrum.solver import (
    Moments,
    NodePlanner,
    Regression,
    Row,
    Trajectory,
    moments_of,
    regress,
    traced,
    unipc,
)

_RIDGE = 1e-4
_LEAST, _MOST = 0.25, 3.0  # weights of videos


@dataclass(slots=True)
class Pass:
    """One pass of a fit, on the first rank.

    Attributes:
        nodes: computed steps.
        rows: coefficients of y_1 … y_N.
        forecasts: coefficients of the guided velocity at the nodes 1 … N − 1.
        expected: root mean square over videos of each forecast's relative error.
        errors: relative error of each video's result, by coefficients fitted to the others.
        surprises: for each video, how much worse its forecasts were than expected.
        results: latents of each video's result.
    """

    nodes: tuple[int, ...]
    rows: list[list[float]] = field(default_factory=list)
    forecasts: list[list[float]] = field(default_factory=list)
    expected: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    surprises: list[float] = field(default_factory=list)
    results: list[torch.Tensor] = field(default_factory=list)


def score(errors: Sequence[float]) -> float:
    """Grade of a pass, dB, by mean and tail of its videos' errors: higher is better."""
    grades = [-20.0 * math.log10(max(error, 1e-12)) for error in errors]
    return float(np.mean(grades) + np.percentile(grades, 10)) / 2.0


def weights_of(errors: Sequence[float]) -> list[float]:
    """Weights of videos in a pass, from the errors of a pass before: less where it went badly."""
    middle = float(np.median(errors))
    return [float(np.clip((middle / max(error, 1e-12)) ** 2, _LEAST, _MOST)) for error in errors]


class SolverFitting:
    """Fits solvers, as one rank of the engine's group; all ranks call it alike.

    Args:
        session: the videos.
        runs: a prepared run of each video.
        states: states of the videos' full runs, on the first rank.
    """

    def __init__(self, session: Session, runs: Sequence[Run], states: StateFiles):
        self._session, self._runs, self._states = session, list(runs), states
        plan = runs[0].plan
        self._plan, self._apart = plan, plan.request.guided
        self._evaluators = [Evaluator(run.networks, plan.windows, apart=self._apart) for run in runs]
        self._sampler = plan.fresh_sampler()
        self._first: dict[int, list[torch.Tensor]] = {}  # values at step 0, which all passes share

    @property
    def levels(self) -> list[float]:
        """σ of the sampler, `[n + 1]`."""
        return [float(level) for level in self._sampler.sigmas]

    def planner(
        self, gram: Gram, sensitivity: Sequence[float], response: Sequence[float], power: float
    ) -> NodePlanner:
        """Make a planner of nodes.

        Args:
            gram, sensitivity, response: as in the calibration.
            power: as of the planner.
        """
        fresh = self._plan.fresh_sampler()

        def step(index: int, velocity: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
            moved: torch.Tensor = fresh.step(velocity, fresh.timesteps[index], state, return_dict=False)[0]
            return moved

        full = traced(step, self._plan.steps)
        return NodePlanner(gram, full, self.levels, sensitivity, response, power, self._plan.course.numbers)

    @torch.no_grad()
    def run(self, nodes: tuple[int, ...], weights: Sequence[float] | None, name: str) -> Pass:
        """Make one pass over all videos; only the first rank's result has numbers.

        Args:
            nodes: computed steps.
            weights: weight of each video; None for all alike.
            name: name of the pass, for progress.
        """
        with self._states.room(len(self._runs) * 2 * len(nodes)) if self._leads else _nothing() as room:
            made = _PassInProgress(self, nodes, weights, name, room)
            return made.run()

    @property
    def _leads(self) -> bool:
        return self._session.ranks.is_leader


class _PassInProgress:
    """One pass: the trajectories of all videos, which the first rank holds."""

    def __init__(
        self,
        fitting: SolverFitting,
        nodes: tuple[int, ...],
        weights: Sequence[float] | None,
        name: str,
        room: torch.Tensor | None,
    ):
        self._of, self._weights, self._name, self._room = fitting, weights, name, room
        self._videos = len(fitting._runs)
        levels = fitting.levels
        joint = unipc([*(levels[node] for node in nodes), 0.0], nodes)
        scales = [fitting._evaluators[0].scale(node) for node in nodes]
        self._prior = joint.apart(scales) if fitting._apart else joint
        self._found = Pass(nodes)
        self._own = [[np.ones(1)] * self._videos]  # coefficients of each state, by video
        self._misses: list[tuple[float, ...]] = []  # by node and video
        self._trajectories = [Trajectory(self._prior, run.noise_BCFHW.cpu()) for run in fitting._runs]
        ranks, branches = fitting._session.ranks, fitting._plan.request.branches
        schedule = FixedSchedule.full(max(self._videos * len(nodes), 1))
        self._coordinator = Coordinator(
            dict.fromkeys(branches, schedule), name, ranks, commands=fitting._session.engine.commands
        )

    def run(self) -> Pass:
        nodes, steps = self._found.nodes, self._of._plan.steps
        for k, end in enumerate([*nodes[1:], steps]):
            velocities = [self._advance(k, video) for video in range(self._videos)]
            if self._of._leads:
                with self._of._session.ranks.busy("fitting a solver"):
                    self._regress(k, end, velocities)
        self._coordinator.finish()
        if self._of._leads:
            self._finish()
        return self._found

    def _advance(self, k: int, video: int) -> Moments | None:
        """Compute the model at a video's node k; return the moments of its velocity, on the first rank."""
        of, step, began = self._of, self._found.nodes[k], time.perf_counter()
        run, ranks = of._runs[video], of._session.ranks
        if k == 0 and video in of._first:
            self._record(k, video, of._first[video])
            return None
        decision = self._coordinator.decide(len(self._coordinator.decisions))
        if decision.command >= Command.STOP:
            raise CancelledError(f"stopped in {self._name}")
        latents_BCFHW = torch.empty_like(run.noise_BCFHW)
        if of._leads:
            latents_BCFHW.copy_(self._trajectories[video].combine(self._own[k][video]))
        ranks.everyone.broadcast(latents_BCFHW)
        timestep = of._sampler.timesteps[step]
        timestep_B = timestep.expand(latents_BCFHW.shape[0])
        found = of._evaluators[video].evaluate(step, latents_BCFHW, timestep_B)
        ranks.synchronize()
        seconds = time.perf_counter() - began
        of._session.on_step(self._name, StepRecord(step, StepKind.COMPUTE, float(timestep), seconds))
        values = [value.cpu() for value in found.values_BCFHW] if of._leads else []
        if k == 0:
            of._first[video] = values
        moments = None
        if of._leads and k > 0:
            moments = moments_of(self._regressors(video), found.velocity_BCFHW.cpu())
        self._record(k, video, values)
        return moments

    def _record(self, k: int, video: int, values: Sequence[torch.Tensor]) -> None:
        """Remember the values of a node, in the pass's room on disk."""
        if self._room is None:
            return
        width, nodes = self._prior.width, len(self._found.nodes)
        kept = []
        for number, value in enumerate(values):
            kept.append(self._room[(video * nodes + k) * width + number].copy_(value))
        self._trajectories[video].record(kept)

    def _regressors(self, video: int) -> list[torch.Tensor]:
        """Noise and values of a video so far."""
        one = self._trajectories[video]
        values = [value for node in range(one.node) for value in one.values(node)]
        return [self._of._runs[video].noise_BCFHW.cpu(), *values]

    def _regress(self, k: int, end: int, velocities: Sequence[Moments | None]) -> None:
        """Find the coefficients of the forecast of node k, and those of the state of node k + 1."""
        known = [moments for moments in velocities if moments is not None]
        if known:
            found = regress(known, self._latest(k), _RIDGE, self._weights)
            self._found.forecasts.append(found.row.tolist())
            self._misses.append(found.errors)
            self._found.expected.append(float(np.sqrt(np.mean(np.square(found.errors)))))
        moments = [
            moments_of(self._regressors(video), self._of._states.state(video, end))
            for video in range(self._videos)
        ]
        state: Regression = regress(moments, self._prior.rows[k + 1], _RIDGE, self._weights)
        self._found.rows.append(state.row.tolist())
        self._own.append(list(state.held_out))
        self._found.errors = list(state.errors)

    def _latest(self, k: int) -> Row:
        """Coefficients of the guided velocity of the node before node k: what a forecast begins with."""
        row = np.zeros(1 + self._prior.width * k)
        row[-self._prior.width] = 1.0
        if self._prior.width == 2:
            row[-1] = self._of._evaluators[0].scale(self._found.nodes[k - 1])
        return row

    def _finish(self) -> None:
        nodes = self._found.nodes[1:]
        expected = dict(zip(nodes, self._found.expected, strict=True))
        for video in range(self._videos):
            missed = {node: errors[video] for node, errors in zip(nodes, self._misses, strict=True)}
            self._found.surprises.append(surprise(missed, expected))
            self._found.results.append(self._trajectories[video].combine(self._own[-1][video]))


@contextmanager
def _nothing() -> Iterator[None]:
    yield None
