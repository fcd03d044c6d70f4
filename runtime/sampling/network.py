"""Networks: a model's transformers in one generation, as one rank runs them.

Tensor legend: B batch, S tokens on this rank, D channels of the transformer, C latent channels, F latent
frames, H, W latent height and width, T text tokens, P values of a token's patch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import NamedTuple, Protocol

import torch

from runtime.models.base import Adapter, Geometry, Time
from runtime.parallel.guidance import Guidance
from runtime.parallel.sequence import TokenSequence, WholeSequence
from runtime.sampling.course import Course
from spectrum import Squares


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


class Networks(Protocol):
    """The networks of one window, of which one computes each step: a single one, or those of experts."""

    def at(self, step: int) -> Network:
        """The network that computes `step`; all have the same branches, tokens and device."""
        ...

    def forgets(self, step: int, *, outputs: bool) -> bool:
        """Whether what is remembered says nothing of `step` and those after it; see `Course.forgets`."""
        ...

    def conditioned(self, condition_BCFHW: torch.Tensor) -> Networks:
        """The same, conditioned on something else."""
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
        scale: of guidance, for a transformer that has it embedded.
        sequence: how this rank holds the tokens.
        condition_BCFHW: what the latents are conditioned on, in the transformer's dtype; see `models.base`.
    """

    adapter: Adapter
    geometry: Geometry
    branches: tuple[Branch, ...]
    guidance: Guidance
    sequence: TokenSequence = field(default_factory=WholeSequence)
    condition_BCFHW: torch.Tensor | None = None
    scale: float | None = None

    def at(self, step: int) -> Network:
        """This one, at every step."""
        return self

    def forgets(self, step: int, *, outputs: bool) -> bool:
        """Never: no other network has remembered anything."""
        return False

    def conditioned(self, condition_BCFHW: torch.Tensor) -> Network:
        """The same, conditioned on something else."""
        return replace(self, condition_BCFHW=condition_BCFHW)

    def time(self, timestep_B: torch.Tensor) -> Time:
        """The embedded timestep, 0 … 1000, of each batch entry."""
        return self.adapter.time(timestep_B, self.scale)

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


@dataclass(frozen=True, slots=True)
class ExpertNetworks:
    """The networks of a model's experts.

    Attributes:
        networks: one for each expert of the course.
    """

    networks: tuple[Network, ...]
    course: Course

    def at(self, step: int) -> Network:
        """That of the step's expert."""
        return self.networks[self.course.numbers[step]]

    def forgets(self, step: int, *, outputs: bool) -> bool:
        """As the course has it."""
        return self.course.forgets(step, outputs=outputs)

    def conditioned(self, condition_BCFHW: torch.Tensor) -> ExpertNetworks:
        """The same, each conditioned on something else."""
        return replace(self, networks=tuple(one.conditioned(condition_BCFHW) for one in self.networks))
