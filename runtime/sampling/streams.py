"""Streams: what is forecast on skipped steps, and the guided velocity that comes of it either way.

The loop asks a stream to `advance`; it computes and remembers, or forecasts, each branch as was decided, and
returns the velocity that the sampler takes. Forecaster, coordinator and loop do not know which stream they
carry. Per token and remembered step, `feature` holds D numbers for each branch (5120 in Wan2.1 14B),
`velocity` 64 for each branch, and `guided` 64 for both together.

Tensor legend: B batch, S tokens on this rank, D channels of the transformer, C latent channels, F latent
frames, H, W latent height and width, T text tokens, P values of a token's patch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar, NamedTuple, Protocol

import torch

from runtime.checkpoint.history import History
from runtime.models.base import Adapter, Geometry, Time
from runtime.parallel.guidance import Guidance
from runtime.parallel.sequence import TokenSequence, WholeSequence
from spectrum import Forecaster, Predictor, Squares, StepKind

Kinds = Mapping[str, StepKind]
"""Branch → whether it is computed or forecast."""


class StreamOutput(NamedTuple):
    """What a stream gives for one step.

    Attributes:
        velocity_BCFHW: guided velocity, in the transformer's dtype.
        squares: how far forecasts of this step would have been off, summed over this rank's shard of the
            branches that were computed; None where there was nothing to forecast from.
        parts: branch → its projected tokens on this rank, where there are any; for saying which branch it is
            when the velocity is not a number.
    """

    velocity_BCFHW: torch.Tensor
    squares: Squares | None = None
    parts: Mapping[str, torch.Tensor] = MappingProxyType({})


class Stream(Protocol):
    """One choice of what is forecast."""

    def advance(
        self, step: int, kinds: Kinds, latents_BCFHW: torch.Tensor, timestep_B: torch.Tensor
    ) -> StreamOutput:
        """Compute some branches, remembering what later forecasts need, and forecast the others."""
        ...

    def history(self) -> History:
        """What this rank remembers of its own shard. Not copied, and never written to again."""
        ...

    def whole(self) -> History:
        """What every rank remembers alike. Not copied, and never written to again."""
        ...

    def restore(self, history: History, whole: History, *, sharded: bool) -> None:
        """Remember a `history`, of this rank's shards or of all tokens to take them from, and a `whole`."""
        ...

    @property
    def bytes(self) -> int:
        """Memory held for forecasting on this rank."""
        ...

    @property
    def kept(self) -> int:
        """Values remembered of each thing that is forecast."""
        ...

    @property
    def names(self) -> tuple[str, ...]:
        """What `history` may be of, on this rank."""
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
        condition_BCFHW: what the latents are conditioned on, in the transformer's dtype; see `models.base`.
    """

    adapter: Adapter
    geometry: Geometry
    branches: tuple[Branch, ...]
    guidance: Guidance
    sequence: TokenSequence = field(default_factory=WholeSequence)
    condition_BCFHW: torch.Tensor | None = None

    def features(
        self, branches: Iterable[Branch], latents_BCFHW: torch.Tensor, time: Time
    ) -> list[torch.Tensor]:
        """Run the blocks for `branches` on latents of any dtype: this rank's shards of the features,
        `[B, S, D]` each."""
        embedded = self.adapter.embed(latents_BCFHW.to(self.adapter.dtype), self.condition_BCFHW)
        tokens = tuple(self.sequence.shard(tokens_BLD) for tokens_BLD in embedded)
        cosines, sines = (self.sequence.shard(table) for table in self.geometry.rotary)
        texts_BTD = [branch.text_BTD for branch in branches]
        return self.adapter.branches(tokens, texts_BTD, time, (cosines, sines))

    def velocity(self, patches_BSP: list[torch.Tensor]) -> torch.Tensor:
        """Projected tokens of this rank's branches → guided velocity `[B, C, F, H, W]` on every rank.

        Only these cross ranks: 64 values per token instead of a feature's 5120 (Wan2.1 14B).
        """
        joined_BSP = self.guidance.join(patches_BSP)
        return self.adapter.unpatchify(self.sequence.gather(joined_BSP), self.geometry.grid)

    def compute(self, latents_BCFHW: torch.Tensor, time: Time) -> StreamOutput:
        """The guided velocity `[B, C, F, H, W]`, with nothing forecast."""
        features = self.features(self.branches, latents_BCFHW, time)
        return self.output([self.adapter.project(feature_BSD, time) for feature_BSD in features])

    def output(self, patches_BSP: list[torch.Tensor], squares: Squares | None = None) -> StreamOutput:
        """What a stream gives that has each of this rank's branches' projected tokens."""
        names = (branch.name for branch in self.branches)
        parts = dict(zip(names, patches_BSP, strict=True))
        return StreamOutput(self.velocity(patches_BSP), squares, parts)


class ComputedStream:
    """Nothing is remembered; every step is computed."""

    bytes = 0
    kept = 0
    names: tuple[str, ...] = ()

    def __init__(self, network: Network):
        self._network = network

    def advance(
        self, step: int, kinds: Kinds, latents_BCFHW: torch.Tensor, timestep_B: torch.Tensor
    ) -> StreamOutput:
        if StepKind.FORECAST in kinds.values():
            raise RuntimeError(f"step {step} is to be forecast, but this generation remembers nothing")
        return self._network.compute(latents_BCFHW, self._network.adapter.time(timestep_B))

    def history(self) -> History:
        return {}

    def whole(self) -> History:
        return {}

    def restore(self, history: History, whole: History, *, sharded: bool) -> None:
        pass


class ForecastStream:
    """A stream with forecasters: one for each of `names`.

    Args:
        storage: where forecasters keep what they remember, if not where it is computed.
    """

    def __init__(
        self, network: Network, predictor: Predictor, names: Iterable[str], storage: torch.device | None
    ):
        self._network = network
        self._forecasters = {name: Forecaster(predictor, storage) for name in names}

    @property
    def bytes(self) -> int:
        return sum(forecaster.bytes for forecaster in self._forecasters.values())

    @property
    def kept(self) -> int:
        return max(len(forecaster.steps) for forecaster in self._forecasters.values())

    def _record(self, step: int, name: str, value: torch.Tensor) -> list[Squares]:
        """Remember a computed value; how far its forecast would have been off, where there is one."""
        forecaster = self._forecasters[name]
        squares = [forecaster.squared_error(step, value)] if forecaster.steps else []
        forecaster.record(step, value)
        return squares

    def _remembered(self) -> History:
        states = {name: forecaster.state_dict() for name, forecaster in self._forecasters.items()}
        return {name: dict(zip(s["steps"], s["values"], strict=True)) for name, s in states.items()}

    def _remember(self, history: History) -> None:
        place = self._network.geometry.rotary[0].device
        for name, forecaster in self._forecasters.items():
            values = dict(sorted(history[name].items()))
            forecaster.load_state_dict({"steps": list(values), "values": list(values.values())}, place)


class FeatureStream(ForecastStream):
    """Spectrum's stream: each branch's output of the last transformer block; the head runs at every step."""

    def __init__(self, network: Network, predictor: Predictor, storage: torch.device | None = None):
        super().__init__(network, predictor, [branch.name for branch in network.branches], storage)

    def advance(
        self, step: int, kinds: Kinds, latents_BCFHW: torch.Tensor, timestep_B: torch.Tensor
    ) -> StreamOutput:
        network, time = self._network, self._network.adapter.time(timestep_B)
        computed = [branch for branch in network.branches if kinds[branch.name] is StepKind.COMPUTE]
        squares: list[Squares] = []
        if computed:
            features = network.features(computed, latents_BCFHW, time)
            for branch, feature_BSD in zip(computed, features, strict=True):
                squares += self._record(step, branch.name, self._kept_of(feature_BSD, time))
        values = [self._forecasters[branch.name].at(step) for branch in network.branches]
        patches = [self._patches_of(value, time) for value in values]
        return network.output(patches, _total(squares))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._forecasters)

    def history(self) -> History:
        return self._remembered()

    def whole(self) -> History:
        return {}

    def restore(self, history: History, whole: History, *, sharded: bool) -> None:
        if not sharded:
            shard = self._network.sequence.shard
            history = {
                name: {step: shard(value).contiguous() for step, value in values.items()}
                for name, values in history.items()
            }
        self._remember(history)

    def _kept_of(self, feature_BSD: torch.Tensor, time: Time) -> torch.Tensor:
        """What is remembered of a computed feature, per token."""
        return feature_BSD

    def _patches_of(self, value: torch.Tensor, time: Time) -> torch.Tensor:
        """What was remembered or forecast → projected tokens `[B, S, P]`."""
        return self._network.adapter.project(value, time)


class VelocityStream(FeatureStream):
    """Each branch's output, token by token; a forecast step runs nothing of the model."""

    def _kept_of(self, feature_BSD: torch.Tensor, time: Time) -> torch.Tensor:
        return self._network.adapter.project(feature_BSD, time)

    def _patches_of(self, value: torch.Tensor, time: Time) -> torch.Tensor:
        return value


class GuidedStream(ForecastStream):
    """The guided velocity `[B, C, F, H, W]`, which every rank has whole: a forecast step moves nothing."""

    NAME: ClassVar[str] = "guided"
    names: tuple[str, ...] = ()

    def __init__(self, network: Network, predictor: Predictor, storage: torch.device | None = None):
        super().__init__(network, predictor, [self.NAME], storage)

    def advance(
        self, step: int, kinds: Kinds, latents_BCFHW: torch.Tensor, timestep_B: torch.Tensor
    ) -> StreamOutput:
        if len(set(kinds.values())) != 1:
            raise RuntimeError(f"step {step}: the branches of a guided stream cannot be told apart: {kinds}")
        if StepKind.COMPUTE not in kinds.values():
            return StreamOutput(self._forecasters[self.NAME].predict(step))
        output = self._network.compute(latents_BCFHW, self._network.adapter.time(timestep_B))
        return output._replace(squares=_total(self._record(step, self.NAME, output.velocity_BCFHW)))

    def history(self) -> History:
        return {}

    def whole(self) -> History:
        return self._remembered()

    def restore(self, history: History, whole: History, *, sharded: bool) -> None:
        self._remember(whole)


STREAMS: dict[str, type[FeatureStream] | type[GuidedStream]] = {
    "feature": FeatureStream,
    "velocity": VelocityStream,
    "guided": GuidedStream,
}


def _total(squares: list[Squares]) -> Squares | None:
    return Squares.total(squares) if squares else None
