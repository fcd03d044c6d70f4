"""Networks: the transformers of a model as one rank runs them in one generation.

Tensor legend: B batch, S tokens on this rank, D channels of the transformer, C latent channels, F latent
frames, H, W latent height and width, T text tokens, P values of a token's patch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import NamedTuple, Protocol

import torch

from runtime.models.base import Adapter, Condition, Geometry, Rotary, Time, Tokens
from runtime.models.course import Course
from runtime.parallel.guidance import Guidance
from runtime.parallel.sequence import TokenSequence, WholeSequence
from runtime.sampling.batching import repeat_batch
from spectrum import Squares


class Moved(NamedTuple):
    """A step of the latents, taken by the sampler or by a stream itself.

    Attributes:
        before_BCFHW: latents, float32, of which the velocity is.
        after_BCFHW: latents after the step, float32; those before it while nothing needs them.
        made_BCFHW: the last tensor that the step has made, in which NaN would show; None if it has made none.
    """

    before_BCFHW: torch.Tensor
    after_BCFHW: torch.Tensor
    made_BCFHW: torch.Tensor | None


class StreamOutput(NamedTuple):
    """Output of a stream for one step.

    Attributes:
        velocity_BCFHW: guided velocity, in the transformer's dtype.
        squares: squared errors that forecasts of this step would have had, summed over this rank's shard of
            the computed branches; None if there was no history to forecast from.
        parts: branch → its projected tokens on this rank, if any; they tell which branch is at fault when the
            velocity is not finite.
        moved: the step itself, where the stream takes it; None where the sampler does.
    """

    velocity_BCFHW: torch.Tensor
    squares: Squares | None = None
    parts: Mapping[str, torch.Tensor] = MappingProxyType({})
    moved: Moved | None = None


class Networks(Protocol):
    """Networks of one window, exactly one of which computes each step: a single one, or one per expert."""

    def at(self, step: int) -> Network:
        """Return the network that computes `step`; all have the same branches, tokens and device."""
        ...

    def forgets(self, step: int, *, outputs: bool) -> bool:
        """Return whether a history is dropped before `step`; see `Course.forgets`."""
        ...

    def conditioned(self, condition: Condition) -> Networks:
        """Copy the networks with another conditioning."""
        ...


@dataclass(frozen=True, slots=True)
class Branch:
    """Branch of classifier-free guidance, `cond` or `uncond`, with its text."""

    name: str
    text_BTD: torch.Tensor


@dataclass(frozen=True, slots=True)
class Network:
    """Transformer as one rank runs it in one generation.

    Attributes:
        adapter: the transformer.
        geometry: token grid and rotary tables of the whole latent.
        branches: branches that this rank computes, the conditional one first.
        guidance: joins the branches.
        sequence: this rank's shard of the tokens.
        condition: conditioning beside the text; None for text alone.
        scale: guidance scale, for transformers that take it as an input.
        batched: whether several branches of this rank are evaluated as one batch.
    """

    adapter: Adapter
    geometry: Geometry
    branches: tuple[Branch, ...]
    guidance: Guidance
    sequence: TokenSequence = field(default_factory=WholeSequence)
    condition: Condition | None = None
    scale: float | None = None
    batched: bool = False

    def at(self, step: int) -> Network:
        """Return this network, which computes every step."""
        return self

    def forgets(self, step: int, *, outputs: bool) -> bool:
        """Return False: every history is of this network."""
        return False

    def expect(self) -> None:
        """Begin to bring the weights of the blocks to the device, if they are elsewhere."""
        self.adapter.expect()

    def conditioned(self, condition: Condition) -> Network:
        """Copy the network with another conditioning."""
        return replace(self, condition=condition)

    def time(self, timestep_B: torch.Tensor) -> Time:
        """Embed the timestep, 0 … 1000, of each batch entry; that of known frames is 0."""
        known_BCFHW = None if self.condition is None else self.condition.known
        if known_BCFHW is None:
            return self.adapter.time(timestep_B, self.scale)
        grid = self.geometry.grid
        places_L = torch.arange(grid.tokens, device=timestep_B.device)
        known_L = places_L < known_BCFHW.shape[2] * grid.height * grid.width
        return self.adapter.time(timestep_B, self.scale, self.sequence.shard(known_L.view(1, -1, 1)))

    def features(
        self, branches: Iterable[Branch], latents_BCFHW: torch.Tensor, time: Time
    ) -> list[torch.Tensor]:
        """Run the blocks for `branches` on latents of any dtype.

        Returns:
            This rank's shard of each branch's features, `[B, S, D]`.
        """
        condition_BCFHW = None if self.condition is None else self.condition.latents_BCFHW
        embedded = self.adapter.embed(latents_BCFHW.to(self.adapter.dtype), condition_BCFHW)
        tokens = tuple(self.sequence.shard(tokens_BLD) for tokens_BLD in embedded)
        cosines, sines = (self.sequence.shard(table) for table in self.geometry.rotary)
        texts_BTD = [branch.text_BTD for branch in branches]
        if self.batched and len(texts_BTD) > 1 and len({text_BTD.shape for text_BTD in texts_BTD}) == 1:
            return self._in_one_batch(tokens, texts_BTD, time, (cosines, sines))
        return self.adapter.branches(tokens, texts_BTD, time, (cosines, sines))

    def _in_one_batch(
        self, tokens: Tokens, texts_BTD: list[torch.Tensor], time: Time, rotary: Rotary
    ) -> list[torch.Tensor]:
        """Run the blocks once, with every text as an entry of a batch."""
        count = len(texts_BTD)
        repeated, all_times = repeat_batch(tokens, count), repeat_batch(time, count)
        (features_BSD,) = self.adapter.branches(repeated, [torch.cat(texts_BTD)], all_times, rotary)
        return [feature_BSD.clone() for feature_BSD in features_BSD.chunk(count)]  # each with its own memory

    def velocity(self, patches_BSP: list[torch.Tensor]) -> torch.Tensor:
        """Join and gather projected tokens to the guided velocity `[B, C, F, H, W]`, the same on every rank.

        Only projected tokens cross ranks: 64 values per token instead of a feature's 5120 (Wan2.1 14B).

        Args:
            patches_BSP: projected tokens of each of this rank's branches.
        """
        joined_BSP = self.guidance.join(patches_BSP)
        return self.adapter.unpatchify(self.sequence.gather(joined_BSP), self.geometry.grid)

    def velocities(self, patches_BSP: list[torch.Tensor]) -> list[torch.Tensor]:
        """Gather projected tokens to the velocity of every branch, the same on every rank.

        Args:
            patches_BSP: projected tokens of each of this rank's branches.

        Returns:
            `[B, C, F, H, W]` for each branch, the conditional one first.
        """
        branches_BSP = self.guidance.gather(patches_BSP)
        whole_BLP = self.sequence.gather(torch.cat(branches_BSP))
        whole_BCFHW = self.adapter.unpatchify(whole_BLP, self.geometry.grid)
        return [*whole_BCFHW.chunk(len(branches_BSP))]

    def compute(self, latents_BCFHW: torch.Tensor, time: Time) -> StreamOutput:
        """Compute the guided velocity, with nothing forecast."""
        features = self.features(self.branches, latents_BCFHW, time)
        return self.output([self.adapter.project(feature_BSD, time) for feature_BSD in features])

    def output(self, patches_BSP: list[torch.Tensor], squares: Squares | None = None) -> StreamOutput:
        """Make a stream's output from the projected tokens of each of this rank's branches."""
        names = (branch.name for branch in self.branches)
        parts = dict(zip(names, patches_BSP, strict=True))
        return StreamOutput(self.velocity(patches_BSP), squares, parts)


@dataclass(frozen=True, slots=True)
class ExpertNetworks:
    """Networks of a model's experts.

    Attributes:
        networks: one per expert, in the order of the course.
        course: expert of each step.
    """

    networks: tuple[Network, ...]
    course: Course

    def at(self, step: int) -> Network:
        """Return the network of the step's expert."""
        return self.networks[self.course.numbers[step]]

    def forgets(self, step: int, *, outputs: bool) -> bool:
        """Return whether a history is dropped before `step`, as the course says."""
        return self.course.forgets(step, outputs=outputs)

    def conditioned(self, condition: Condition) -> ExpertNetworks:
        """Copy the networks with another conditioning."""
        return replace(self, networks=tuple(one.conditioned(condition) for one in self.networks))
