"""Streams: what is forecast on skipped steps, and the guided velocity that comes of it either way.

The loop asks a stream to `advance`; it computes and remembers, or forecasts, each branch as was decided, and
returns the velocity that the sampler takes. Forecaster, coordinator and loop do not know which stream they
carry.

Tensor legend: B batch, S tokens on this rank, D channels of the transformer, C latent channels, F latent
frames, H, W latent height and width, T text tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch

from runtime.guidance import Guidance
from runtime.sequence import Sequence, WholeSequence
from runtime.wan import Geometry, Time, WanAdapter
from spectrum import Forecaster, Predictor, SquaredError, StepKind

Kinds = Mapping[str, StepKind]
"""Branch → whether it is computed or forecast."""

History = dict[str, dict[int, torch.Tensor]]
"""Branch → step → remembered value."""


class StreamOutput(NamedTuple):
    """What a stream gives for one step.

    Attributes:
        velocity_BCFHW: guided velocity, in the transformer's dtype.
        squares: how far forecasts of this step would have been off, summed over this rank's shard of the
            branches that were computed; None where there was nothing to forecast from.
    """

    velocity_BCFHW: torch.Tensor
    squares: SquaredError | None = None


class Stream(Protocol):
    """One choice of what is forecast."""

    def advance(
        self, step: int, kinds: Kinds, latents_BCFHW: torch.Tensor, timestep_B: torch.Tensor
    ) -> StreamOutput:
        """Compute some branches, remembering what later forecasts need, and forecast the others."""
        ...

    def history(self) -> History:
        """What is remembered: branch → step → this rank's shard. Not copied, and never written to again."""
        ...

    def restore(self, history: History, *, sharded: bool) -> None:
        """Remember a `history`: this rank's shards, or whole values to take this rank's shard of."""
        ...

    @property
    def bytes(self) -> int:
        """Memory held for forecasting on this rank."""
        ...

    @property
    def kept(self) -> int:
        """Values remembered per branch."""
        ...


@dataclass(frozen=True, slots=True)
class Branch:
    """One half of classifier-free guidance: `cond` or `uncond`."""

    name: str
    text_BTD: torch.Tensor


@dataclass(frozen=True, slots=True)
class Network:
    """The transformer in one generation, as one rank runs it.

    Attributes:
        adapter: the transformer.
        geometry: of the whole latent.
        branches: the branches that this rank computes, the conditional first.
        guidance: joins the branches.
        sequence: how this rank holds the tokens.
    """

    adapter: WanAdapter
    geometry: Geometry
    branches: tuple[Branch, ...]
    guidance: Guidance
    sequence: Sequence = field(default_factory=WholeSequence)

    def embed(self, latents_BCFHW: torch.Tensor) -> torch.Tensor:
        """Latents of any dtype → this rank's tokens `[B, S, D]`."""
        return self.sequence.shard(self.adapter.embed(latents_BCFHW.to(self.adapter.dtype)))

    def feature(self, tokens_BSD: torch.Tensor, branch: Branch, time: Time) -> torch.Tensor:
        """Run the blocks for one branch: this rank's shard of the feature, `[B, S, D]`."""
        cosines, sines = (self.sequence.shard(table) for table in self.geometry.rotary)
        return self.adapter.blocks(tokens_BSD, branch.text_BTD, time, (cosines, sines))

    def velocity(self, features: list[torch.Tensor], time: Time) -> torch.Tensor:
        """Features of this rank's branches → guided velocity `[B, C, F, H, W]` on every rank.

        Only projected patches cross ranks: 64 values per token instead of a feature's 5120 (Wan2.1 14B).
        """
        patches_BSP = self.guidance.join([self.adapter.project(feature, time) for feature in features])
        return self.adapter.unpatchify(self.sequence.gather(patches_BSP), self.geometry.grid)


class ComputedStream:
    """Nothing is remembered; every step is computed."""

    bytes = 0
    kept = 0

    def __init__(self, network: Network):
        self._network = network

    def advance(
        self, step: int, kinds: Kinds, latents_BCFHW: torch.Tensor, timestep_B: torch.Tensor
    ) -> StreamOutput:
        if StepKind.FORECAST in kinds.values():
            raise RuntimeError(f"step {step} is to be forecast, but this generation remembers nothing")
        network, time = self._network, self._network.adapter.time(timestep_B)
        tokens_BSD = network.embed(latents_BCFHW)
        features = [network.feature(tokens_BSD, branch, time) for branch in network.branches]
        return StreamOutput(network.velocity(features, time))

    def history(self) -> History:
        return {}

    def restore(self, history: History, *, sharded: bool) -> None:
        pass


class FeatureStream:
    """Spectrum's stream: each branch's output of the last transformer block; the head runs at every step."""

    def __init__(self, network: Network, predictor: Predictor):
        self._network = network
        self._forecasters = {branch.name: Forecaster(predictor) for branch in network.branches}

    @property
    def bytes(self) -> int:
        return sum(forecaster.bytes for forecaster in self._forecasters.values())

    @property
    def kept(self) -> int:
        return max(len(forecaster.steps) for forecaster in self._forecasters.values())

    def advance(
        self, step: int, kinds: Kinds, latents_BCFHW: torch.Tensor, timestep_B: torch.Tensor
    ) -> StreamOutput:
        network, time = self._network, self._network.adapter.time(timestep_B)
        computed = [branch for branch in network.branches if kinds[branch.name] is StepKind.COMPUTE]
        squares: list[SquaredError] = []
        if computed:
            tokens_BSD = network.embed(latents_BCFHW)
        for branch in computed:
            squares += self._record(step, branch.name, network.feature(tokens_BSD, branch, time))
        features = [self._forecasters[branch.name].at(step) for branch in network.branches]
        return StreamOutput(network.velocity(features, time), _total(squares))

    def history(self) -> History:
        states = {branch: forecaster.state_dict() for branch, forecaster in self._forecasters.items()}
        return {b: dict(zip(s["steps"], s["values"], strict=True)) for b, s in states.items()}

    def restore(self, history: History, *, sharded: bool) -> None:
        place, sequence = self._network.geometry.rotary[0].device, self._network.sequence
        for branch, forecaster in self._forecasters.items():
            values = {step: value.to(place) for step, value in sorted(history[branch].items())}
            own = [value if sharded else sequence.shard(value).contiguous() for value in values.values()]
            forecaster.load_state_dict({"steps": list(values), "values": own})

    def _record(self, step: int, branch: str, feature_BSD: torch.Tensor) -> list[SquaredError]:
        """Remember a computed feature; how far its forecast would have been off, where there is one."""
        forecaster = self._forecasters[branch]
        squares = [forecaster.squared_error(step, feature_BSD)] if forecaster.steps else []
        forecaster.record(step, feature_BSD)
        return squares


def _total(squares: list[SquaredError]) -> SquaredError | None:
    if not squares:
        return None
    return SquaredError(sum(s.error for s in squares), sum(s.truth for s in squares))
