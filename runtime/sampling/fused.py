"""A stream of the guided velocity whose forecasts are fused with the sampler's steps.

Every state is one weighted sum of the noise and the velocities computed so far, so a run of forecast steps
does nothing until a state is needed: before a computed step, or at the end. Which steps are computed may be
decided at each of them. Neither the sampler nor a forecast reads a number back from the device.

Tensor legend: B batch, C latent channels, F latent frames, H, W latent height and width.
"""

from __future__ import annotations

import torch

from runtime.checkpoint.history import History
from runtime.sampling.evaluator import Evaluation, Evaluator
from runtime.sampling.fitted import shared_kind
from runtime.sampling.network import Moved, StreamOutput
from runtime.sampling.streams import GuidedStream, Kinds
from spectrum import Predictor, Squares, StepKind
from spectrum.solver import FusedSampler, Multistep, Row
from spectrum.storage import kept, placed
from spectrum.weighted import weighted_sum


class FusedStream:
    """Stream that takes the sampler's steps by its coefficients; a `Stream`.

    Args:
        evaluator: the model, with its branches joined.
        full: coefficients of the sampler that computes every step.
        start_BCFHW: initial noise, float32.
        predictor: weights of the forecasts.
        storage: device on which computed velocities are kept, if not where they are computed.
    """

    names: tuple[str, ...] = ()

    def __init__(
        self,
        evaluator: Evaluator,
        full: Multistep,
        start_BCFHW: torch.Tensor,
        predictor: Predictor,
        storage: torch.device | None = None,
    ):
        self._evaluator, self._full, self._predictor = evaluator, full, predictor
        self._start_BCFHW, self._storage = start_BCFHW, storage
        self._begin()

    def _begin(self) -> None:
        self._fused = FusedSampler(self._full, self._predictor)
        self._values: list[torch.Tensor] = []  # velocity of each node, float32
        self._latest_BCFHW: torch.Tensor | None = None  # the newest of them, on the device

    def advance(
        self, step: int, kinds: Kinds, latents_BCFHW: torch.Tensor, timestep_B: torch.Tensor
    ) -> StreamOutput:
        kind = shared_kind(step, kinds)
        self._forecast_until(step)
        if kind is StepKind.COMPUTE:
            output = self._compute(step, timestep_B)
        else:
            self._fused.forecast()
            output = StreamOutput(self._newest(), moved=Moved(latents_BCFHW, latents_BCFHW, None))
        if self._fused.step < self._fused.steps:
            self._forget_where_due()
            return output
        last_BCFHW = self._state()
        assert output.moved is not None
        before_BCFHW = output.moved.before_BCFHW
        return output._replace(moved=Moved(before_BCFHW, last_BCFHW, last_BCFHW))

    def _compute(self, step: int, timestep_B: torch.Tensor) -> StreamOutput:
        """Compute the velocity at the state before `step`."""
        before_BCFHW = self._state()
        found: Evaluation = self._evaluator.evaluate(step, before_BCFHW, timestep_B)
        velocity_BCFHW, squares = found.velocity_BCFHW.detach(), None
        if self._fused.remembers:
            error_BCFHW = self._sum(self._fused.weights()).sub_(velocity_BCFHW)
            squares = Squares(error_BCFHW.square_().sum().double(), velocity_BCFHW.square().sum().double())
        self._fused.compute()
        self._latest_BCFHW = velocity_BCFHW
        self._values.append(kept(velocity_BCFHW, self._storage))
        moved = Moved(before_BCFHW, before_BCFHW, velocity_BCFHW)
        return StreamOutput(velocity_BCFHW, squares, found.parts, moved)

    def _forecast_until(self, step: int) -> None:
        """Take the steps before `step` that were forecast before a generation was interrupted."""
        while self._fused.step < step:
            self._fused.forecast()
            self._forget_where_due()

    def _forget_where_due(self) -> None:
        if self._evaluator.forgets(self._fused.step):
            self._fused.forget()

    def _state(self) -> torch.Tensor:
        """State before the current step, float32."""
        noise, *velocities = self._fused.state().tolist()
        if not velocities:
            return self._start_BCFHW
        return self._sum(velocities).add_(self._start_BCFHW, alpha=noise)

    def _sum(self, weights: Row | list[float]) -> torch.Tensor:
        """Weighted sum of the nodes' velocities; those of weight 0 are not read."""
        used = [
            (float(weight), value)
            for weight, value in zip(weights, self._values, strict=True)
            if weight != 0.0
        ] or [(0.0, self._values[-1])]
        numbers, values = zip(*used, strict=True)
        return weighted_sum([*numbers], [*values], self._start_BCFHW.device)

    def _newest(self) -> torch.Tensor:
        if self._latest_BCFHW is None:
            self._latest_BCFHW = self._values[-1].to(self._start_BCFHW.device)
        return self._latest_BCFHW

    @property
    def bytes(self) -> int:
        return sum(value.numel() * value.element_size() for value in self._values)

    @property
    def kept(self) -> int:
        return len(self._values)

    def history(self) -> History:
        return {}

    def whole(self) -> History:
        return {GuidedStream.NAME: dict(zip(self._fused.nodes, self._values, strict=True))}

    def restore(self, history: History, whole: History, *, sharded: bool) -> None:
        self._begin()
        for node, value in sorted(whole[GuidedStream.NAME].items()):
            self._forecast_until(node)
            self._fused.compute()
            self._values.append(placed(value, self._storage, self._start_BCFHW.device))
            if self._fused.step < self._fused.steps:
                self._forget_where_due()
