"""Probes: streams that compute every step and measure, from which a calibration is made.

Tensor legend: n sampler steps; B batch, S tokens on this rank, D channels, P values of a token's patch; C, F,
H, W latent channels, frames, height and width.
"""

from __future__ import annotations

import numpy as np
import torch

from runtime.checkpoint.history import History
from runtime.forecasting.calibration import StreamName
from runtime.sampling.network import Networks, StreamOutput
from runtime.sampling.streams import GuidedStream, Kinds, Stream
from spectrum import Gram
from spectrum.calibration import gram_of, norm, nudge, sample


class _Probe:
    """A stream that cannot be checkpointed."""

    bytes = 0
    kept = 0
    names: tuple[str, ...] = ()

    def history(self) -> History:
        return {}

    def whole(self) -> History:
        return {}

    def restore(self, history: History, whole: History, *, sharded: bool) -> None:
        raise RuntimeError("a calibration run cannot be resumed in the middle")


class GramStream(_Probe):
    """Stream that computes every step and remembers samples of its values, for their Gram matrices.

    Args:
        networks: the model.
        start_BCFHW: initial noise.
        is_leader: whether this is the first rank.
    """

    def __init__(self, networks: Networks, start_BCFHW: torch.Tensor, *, is_leader: bool):
        self._networks, self._is_leader = networks, is_leader
        self._start = sample(start_BCFHW)
        names = [branch.name for branch in networks.at(0).branches]
        self._values: dict[StreamName, dict[str, list[torch.Tensor]]] = {
            "feature": {name: [] for name in names},
            "velocity": {name: [] for name in names},
            "guided": {GuidedStream.NAME: []} if is_leader else {},  # each rank has it whole
        }
        self.last_BCFHW: torch.Tensor | None = None

    def advance(
        self, step: int, kinds: Kinds, latents_BCFHW: torch.Tensor, timestep_B: torch.Tensor
    ) -> StreamOutput:
        network = self._networks.at(step)
        time = network.time(timestep_B)
        features = network.features(network.branches, latents_BCFHW, time)
        patches = [network.adapter.project(feature, time) for feature in features]
        for branch, feature_BSD, patches_BSP in zip(network.branches, features, patches, strict=True):
            self._values["feature"][branch.name].append(sample(feature_BSD))
            self._values["velocity"][branch.name].append(sample(patches_BSP))
        self.last_BCFHW = network.velocity(patches)
        if self._is_leader:
            self._values["guided"][GuidedStream.NAME].append(sample(self.last_BCFHW))
        return StreamOutput(self.last_BCFHW)

    def grams(self) -> dict[str, Gram]:
        """Gram matrices `[n, n]` of this rank's part of each stream."""
        steps = len(next(iter(self._values["feature"].values())))
        return {
            name: sum((gram_of(values) for values in parts.values()), start=np.zeros((steps, steps)))
            for name, parts in self._values.items()
        }

    def trajectory(self) -> Gram:
        """Gram matrix of the noise and the guided velocities, `[n + 1, n + 1]`; 0 but on the first rank."""
        guided = self._values["guided"].get(GuidedStream.NAME)
        if guided is None:
            size = 1 + len(next(iter(self._values["feature"].values())))
            return np.zeros((size, size))
        return gram_of([self._start.to(guided[0].dtype), *guided])


class NudgedStream(_Probe):
    """Stream whose velocity is nudged at one step, along its own change since the step before.

    Args:
        stream: stream that computes every step.
        step: step of the nudge.
        before_BCFHW: velocity of the step before.

    Attributes:
        size: norm of the nudge, once it was made.
        latents_BCFHW, velocity_BCFHW: what the step after the nudge began with, and its velocity.
    """

    def __init__(self, stream: Stream, step: int, before_BCFHW: torch.Tensor):
        self._stream, self._step, self._before_BCFHW = stream, step, before_BCFHW
        self.size = 0.0
        self.latents_BCFHW: torch.Tensor | None = None
        self.velocity_BCFHW: torch.Tensor | None = None

    def advance(
        self, step: int, kinds: Kinds, latents_BCFHW: torch.Tensor, timestep_B: torch.Tensor
    ) -> StreamOutput:
        output = self._stream.advance(step, kinds, latents_BCFHW, timestep_B)
        if step == self._step + 1:
            self.latents_BCFHW, self.velocity_BCFHW = latents_BCFHW, output.velocity_BCFHW
        if step != self._step:
            return output
        nudge_BCFHW = nudge(output.velocity_BCFHW, self._before_BCFHW)
        self.size = norm(nudge_BCFHW)
        return output._replace(velocity_BCFHW=output.velocity_BCFHW + nudge_BCFHW)
