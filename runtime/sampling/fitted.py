"""A stream that solves: it moves the latents from node to node by itself, and leaves steps between alone.

The latents of a step that is not computed are those of the next node, so such a step does nothing. Should
other steps be computed than the solver's nodes (for a deadline, a guard or a command), it hands over to the
sampler, which goes on with calibrated forecasts from the last values:

- a node is left out: its state, which the solver has made, is where the sampler begins;
- a step between nodes is computed: the sampler begins at the node before, and walks to it on forecasts.

Tensor legend: B batch, C latent channels, F latent frames, H, W latent height and width.
"""

from __future__ import annotations

import torch
from diffusers import SchedulerMixin

from runtime.checkpoint.history import History
from runtime.sampling.evaluator import Evaluation, Evaluator
from runtime.sampling.network import Moved, StreamOutput
from runtime.sampling.streams import GuidedStream, Kinds
from spectrum import Predictor, StepKind, Track
from spectrum.solver import FittedSolver, Trajectory


class FittedStream:
    """Stream of a fitted solver; a `Stream`.

    Args:
        evaluator: the model.
        fitted: the solver.
        start_BCFHW: initial noise, float32.
        sampler: the sampler of the generation, at its beginning; the one that steps after a hand-over.
        predictor: weights of forecasts after a hand-over.
        storage: device on which values are kept, if not where they are computed.
    """

    names: tuple[str, ...] = ()

    def __init__(
        self,
        evaluator: Evaluator,
        fitted: FittedSolver,
        start_BCFHW: torch.Tensor,
        sampler: SchedulerMixin,
        predictor: Predictor,
        storage: torch.device | None = None,
    ):
        self._evaluator, self._fitted, self._sampler = evaluator, fitted, sampler
        self._nodes, self._device = fitted.solver.nodes, start_BCFHW.device
        self._predictor, self._storage = predictor, storage
        self._trajectory: Trajectory | None = Trajectory(fitted.solver, start_BCFHW, storage)
        self._track: Track | None = None  # after a hand-over
        self._latest_BCFHW: torch.Tensor | None = None  # guided velocity of the newest node

    def advance(
        self, step: int, kinds: Kinds, latents_BCFHW: torch.Tensor, timestep_B: torch.Tensor
    ) -> StreamOutput:
        kind = shared_kind(step, kinds)
        computes = kind is StepKind.COMPUTE
        if self._trajectory is None:
            return self._forecast(step, kind, latents_BCFHW, timestep_B)
        if computes == (step in self._nodes):
            return self._solve(self._trajectory, step, latents_BCFHW, timestep_B, computes=computes)
        if not computes:
            self._hand_over(self._trajectory, step)
            return self._forecast(step, kind, latents_BCFHW, timestep_B)
        before_BCFHW = self._walk(self._trajectory, step)
        output = self._forecast(step, kind, before_BCFHW, timestep_B)
        after_BCFHW = self._stepped(step, output.velocity_BCFHW, before_BCFHW)
        return output._replace(moved=Moved(before_BCFHW, after_BCFHW, after_BCFHW))

    def _solve(
        self,
        trajectory: Trajectory,
        step: int,
        latents_BCFHW: torch.Tensor,
        timestep_B: torch.Tensor,
        *,
        computes: bool,
    ) -> StreamOutput:
        """Go to the next node if `step` is one; do nothing otherwise."""
        node = trajectory.node
        if not computes:
            if self._latest_BCFHW is None:
                self._latest_BCFHW = self._guided(trajectory, node - 1)
            return StreamOutput(self._latest_BCFHW, moved=Moved(latents_BCFHW, latents_BCFHW, None))
        found = self._evaluator.evaluate(step, latents_BCFHW, timestep_B)
        squares = None
        if node > 0:
            squares = trajectory.squared_error(self._fitted.forecasts[node - 1], found.velocity_BCFHW)
        trajectory.record(found.values_BCFHW)
        self._latest_BCFHW = found.velocity_BCFHW
        after_BCFHW = trajectory.state()
        moved = Moved(latents_BCFHW, after_BCFHW, after_BCFHW)
        return StreamOutput(found.velocity_BCFHW, squares, found.parts, moved)

    def _forecast(
        self, step: int, kind: StepKind, latents_BCFHW: torch.Tensor, timestep_B: torch.Tensor
    ) -> StreamOutput:
        """Compute the guided velocity or forecast it, for the sampler."""
        if self._track is None or self._evaluator.forgets(step):
            self._track = Track(self._predictor, self._storage)
        found: list[Evaluation] = []

        def compute() -> torch.Tensor:
            found.append(self._evaluator.evaluate(step, latents_BCFHW, timestep_B))
            return found[0].velocity_BCFHW

        advanced = self._track.advance(step, kind, compute)
        return StreamOutput(advanced.value, advanced.squares, found[0].parts if found else {})

    def _hand_over(self, trajectory: Trajectory, step: int) -> None:
        """Let the sampler begin at `step`, with the velocities of the nodes so far to forecast from."""
        self._sampler.set_begin_index(step)
        self._remember(
            {
                self._nodes[node]: self._guided(trajectory, node)
                for node in range(trajectory.node)
                if not any(self._evaluator.forgets(later) for later in range(self._nodes[node] + 1, step + 1))
            }
        )

    def _walk(self, trajectory: Trajectory, step: int) -> torch.Tensor:
        """Hand over at the last node, and return the latents to which the sampler comes from there."""
        last = trajectory.node - 1
        first, latents_BCFHW = self._nodes[last], trajectory.state(last)
        self._hand_over(trajectory, first)
        assert self._track is not None
        latents_BCFHW = self._stepped(first, self._guided(trajectory, last), latents_BCFHW)
        for between in range(first + 1, step):
            timestep_B = self._sampler.timesteps[between].expand(latents_BCFHW.shape[0])
            output = self._forecast(between, StepKind.FORECAST, latents_BCFHW, timestep_B)
            latents_BCFHW = self._stepped(between, output.velocity_BCFHW, latents_BCFHW)
        return latents_BCFHW

    def _stepped(self, step: int, velocity_BCFHW: torch.Tensor, latents_BCFHW: torch.Tensor) -> torch.Tensor:
        stepped_BCFHW: torch.Tensor = self._sampler.step(
            velocity_BCFHW, self._sampler.timesteps[step], latents_BCFHW, return_dict=False
        )[0]
        return stepped_BCFHW

    def _guided(self, trajectory: Trajectory, node: int) -> torch.Tensor:
        values = [value.to(self._device) for value in trajectory.values(node)]
        return self._evaluator.guided(self._nodes[node], values)

    def _remember(self, velocities: dict[int, torch.Tensor]) -> None:
        """Go on from the velocities of earlier steps; the solver is not needed any more."""
        values = dict(sorted(velocities.items()))
        if self._predictor.memory is not None:
            values = dict(list(values.items())[-self._predictor.memory :])
        self._track = Track(self._predictor, self._storage)
        self._trajectory = self._latest_BCFHW = None
        self._track.load_state_dict({"steps": list(values), "values": list(values.values())}, self._device)

    @property
    def bytes(self) -> int:
        return sum(one.bytes for one in (self._trajectory, self._track) if one is not None)

    @property
    def kept(self) -> int:
        if self._trajectory is not None:
            return self._trajectory.node
        return 0 if self._track is None else len(self._track.steps)

    def history(self) -> History:
        return {}

    def whole(self) -> History:
        if self._trajectory is not None:
            nodes = range(self._trajectory.node)
            of_node = {self._nodes[node]: self._trajectory.values(node) for node in nodes}
            return {
                name: {step: values[number] for step, values in of_node.items()}
                for number, name in enumerate(self._evaluator.names)
            }
        assert self._track is not None
        state = self._track.state_dict()
        return {_HANDED_OVER: dict(zip(state["steps"], state["values"], strict=True))}

    def restore(self, history: History, whole: History, *, sharded: bool) -> None:
        if _HANDED_OVER in whole:
            self._remember(whole[_HANDED_OVER])
            return
        assert self._trajectory is not None
        self._latest_BCFHW = None
        of_value = [whole[name] for name in self._evaluator.names]
        steps = sorted(of_value[0])
        self._trajectory.load(
            {self._nodes.index(step): [values[step] for values in of_value] for step in steps}
        )


_HANDED_OVER = f"{GuidedStream.NAME} after a hand-over"


def shared_kind(step: int, kinds: Kinds) -> StepKind:
    """Kind of a step, which is the same for both branches."""
    if len(set(kinds.values())) != 1:
        raise RuntimeError(f"step {step}: the branches of a solver cannot be told apart: {kinds}")
    return next(iter(kinds.values()))
