"""Streams: what is forecast on skipped steps, and the guided velocity that comes of it either way.

The loop asks a stream to `advance`; it computes and remembers, or forecasts, each branch as was decided, and
returns the velocity that the sampler takes. Forecaster, coordinator and loop do not know which stream they
carry. Per token and remembered step, `feature` holds D numbers for each branch (5120 in Wan2.1 14B),
`velocity` 64 for each branch, and `guided` 64 for both together.

Tensor legend: B batch, S tokens on this rank, D channels of the transformer, C latent channels, F latent
frames, H, W latent height and width, T text tokens, P values of a token's patch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Protocol, TypeVar

import torch

from runtime.checkpoint.history import History
from runtime.files.extensions import source_of
from runtime.forecasting.streams import STREAM_TRAITS, StreamTraits
from runtime.models.base import Time
from runtime.sampling.network import Network, Networks, StreamOutput
from spectrum import Advanced, Predictor, Squares, StepKind, Track

Kinds = Mapping[str, StepKind]
"""Branch → whether it is computed or forecast."""


class Stream(Protocol):
    """A stream: the quantity that is forecast, with its history."""

    def advance(
        self, step: int, kinds: Kinds, latents_BCFHW: torch.Tensor, timestep_B: torch.Tensor
    ) -> StreamOutput:
        """Compute some branches, recording values for later forecasts, and forecast the others.

        Args:
            step: index of the step.
            kinds: branches that are computed, and those that are forecast.
            latents_BCFHW: latents before the step.
            timestep_B: timestep of each batch entry.
        """
        ...

    def history(self) -> History:
        """History of this rank's own shard; its tensors are not copied, and never written to again."""
        ...

    def whole(self) -> History:
        """History that is the same on every rank; its tensors are not copied, and never written to again."""
        ...

    def restore(self, history: History, whole: History, *, sharded: bool) -> None:
        """Restore the history.

        Args:
            history: result of `history`, of this rank's shards or of all tokens.
            whole: result of `whole`.
            sharded: whether `history` holds this rank's shards; otherwise they are taken from all tokens.
        """
        ...

    @property
    def bytes(self) -> int:
        """Memory of the history on this rank, in bytes."""
        ...

    @property
    def kept(self) -> int:
        """Number of values in the history of each tensor that is forecast."""
        ...

    @property
    def names(self) -> tuple[str, ...]:
        """Keys that `history` may have on this rank."""
        ...


class ComputedStream:
    """Stream without a history, which computes every step."""

    bytes = 0
    kept = 0
    names: tuple[str, ...] = ()

    def __init__(self, networks: Networks):
        self._networks = networks

    def advance(
        self, step: int, kinds: Kinds, latents_BCFHW: torch.Tensor, timestep_B: torch.Tensor
    ) -> StreamOutput:
        if StepKind.FORECAST in kinds.values():
            raise RuntimeError(f"step {step} is to be forecast, but this generation remembers nothing")
        network = self._networks.at(step)
        return network.compute(latents_BCFHW, network.time(timestep_B))

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
        outputs: whether it is of the model's output, which several experts may have in common.
    """

    def __init__(
        self,
        networks: Networks,
        predictor: Predictor,
        names: Iterable[str],
        storage: torch.device | None,
        *,
        outputs: bool,
    ):
        self._networks, self._predictor, self._storage = networks, predictor, storage
        self._outputs = outputs
        self._tracks = {name: Track(predictor, storage) for name in names}

    def _begin(self, step: int) -> Network:
        """Return the network for `step`; clear the history if another expert begins with a fresh one."""
        if self._networks.forgets(step, outputs=self._outputs):
            self._tracks = {name: Track(self._predictor, self._storage) for name in self._tracks}
        return self._networks.at(step)

    @property
    def bytes(self) -> int:
        return sum(track.bytes for track in self._tracks.values())

    @property
    def kept(self) -> int:
        return max(len(track.steps) for track in self._tracks.values())

    def _remembered(self) -> History:
        states = {name: track.state_dict() for name, track in self._tracks.items()}
        return {name: dict(zip(s["steps"], s["values"], strict=True)) for name, s in states.items()}

    def _remember(self, history: History) -> None:
        place = self._networks.at(0).geometry.rotary[0].device
        for name, track in self._tracks.items():
            values = dict(sorted(history[name].items()))
            track.load_state_dict({"steps": list(values), "values": list(values.values())}, place)


class FeatureStream(ForecastStream):
    """Spectrum's stream: each branch's output of the last transformer block; the head runs at every step."""

    _OUTPUTS: ClassVar[bool] = False

    def __init__(self, networks: Networks, predictor: Predictor, storage: torch.device | None = None):
        names = [branch.name for branch in networks.at(0).branches]
        super().__init__(networks, predictor, names, storage, outputs=self._OUTPUTS)

    def advance(
        self, step: int, kinds: Kinds, latents_BCFHW: torch.Tensor, timestep_B: torch.Tensor
    ) -> StreamOutput:
        network = self._begin(step)
        time = network.time(timestep_B)
        computed = [branch for branch in network.branches if kinds[branch.name] is StepKind.COMPUTE]
        features = iter(network.features(computed, latents_BCFHW, time) if computed else [])
        advanced = [
            self._tracks[branch.name].advance(
                step, kinds[branch.name], lambda: self._kept_of(next(features), time, network)
            )
            for branch in network.branches
        ]
        patches = [self._patches_of(one.value, time, network) for one in advanced]
        return network.output(patches, _total(advanced))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._tracks)

    def history(self) -> History:
        return self._remembered()

    def whole(self) -> History:
        return {}

    def restore(self, history: History, whole: History, *, sharded: bool) -> None:
        if not sharded:
            shard = self._networks.at(0).sequence.shard
            history = {
                name: {step: shard(value).contiguous() for step, value in values.items()}
                for name, values in history.items()
            }
        self._remember(history)

    def _kept_of(self, feature_BSD: torch.Tensor, time: Time, network: Network) -> torch.Tensor:
        """Derive the value that is recorded, per token, from a computed feature."""
        return feature_BSD

    def _patches_of(self, value: torch.Tensor, time: Time, network: Network) -> torch.Tensor:
        """Project a recorded or forecast value to patches `[B, S, P]`."""
        return network.adapter.project(value, time)


class VelocityStream(FeatureStream):
    """Stream of each branch's output, token by token; a forecast step runs no part of the model."""

    _OUTPUTS = True

    def _kept_of(self, feature_BSD: torch.Tensor, time: Time, network: Network) -> torch.Tensor:
        return network.adapter.project(feature_BSD, time)

    def _patches_of(self, value: torch.Tensor, time: Time, network: Network) -> torch.Tensor:
        return value


class GuidedStream(ForecastStream):
    """Stream of the guided velocity `[B, C, F, H, W]`, whole on every rank: a forecast step sends nothing."""

    NAME: ClassVar[str] = "guided"
    names: tuple[str, ...] = ()

    def __init__(self, networks: Networks, predictor: Predictor, storage: torch.device | None = None):
        super().__init__(networks, predictor, [self.NAME], storage, outputs=True)

    def advance(
        self, step: int, kinds: Kinds, latents_BCFHW: torch.Tensor, timestep_B: torch.Tensor
    ) -> StreamOutput:
        if len(set(kinds.values())) != 1:
            raise RuntimeError(f"step {step}: the branches of a guided stream cannot be told apart: {kinds}")
        network = self._begin(step)
        computed: list[StreamOutput] = []

        def compute() -> torch.Tensor:
            computed.append(network.compute(latents_BCFHW, network.time(timestep_B)))
            return computed[0].velocity_BCFHW

        kind = StepKind.COMPUTE if StepKind.COMPUTE in kinds.values() else StepKind.FORECAST
        advanced = self._tracks[self.NAME].advance(step, kind, compute)
        output = computed[0] if computed else StreamOutput(advanced.value)
        return output._replace(squares=advanced.squares)

    def history(self) -> History:
        return {}

    def whole(self) -> History:
        return self._remembered()

    def restore(self, history: History, whole: History, *, sharded: bool) -> None:
        self._remember(whole)


STREAMS: dict[str, Callable[..., Stream]] = {
    "feature": FeatureStream,
    "velocity": VelocityStream,
    "guided": GuidedStream,
}


def _total(advanced: Sequence[Advanced]) -> Squares | None:
    """Squared errors of all branches that have one, added up."""
    squares = [one.squares for one in advanced if one.squares is not None]
    return Squares.total(squares) if squares else None


_S = TypeVar("_S", bound=type[Any])


def add_stream(name: str, *, joint: bool = False, outputs: bool = False) -> Callable[[_S], _S]:
    """Add a stream to those that presets may name; returns a decorator of its class.

    The class takes the arguments of `GuidedStream`, and its objects implement `Stream`.

    Args:
        name: name of the stream in presets.
        joint: whether it covers both branches together, so that they share one schedule.
        outputs: whether it is of the model's output, which several experts may have in common.

    Raises:
        ValueError: the name is taken.
    """

    def add(stream: _S) -> _S:
        STREAM_TRAITS.add(name, StreamTraits(joint, outputs, source_of(stream)))
        STREAMS[name] = stream
        return stream

    return add
