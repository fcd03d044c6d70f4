"""What sampling sees of a model, whatever its family: adapters, experts, and what they are given.

Tensor legend: B batch, L tokens, D channels of the transformer, T text tokens, E channels of an encoder, I
image tokens, C latent channels, F latent frames, H, W latent height and width, P values of a token's patch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import nn

from runtime.parallel.attention import Attend
from runtime.request.video_request import VideoRequest

Tokens: TypeAlias = tuple[torch.Tensor, ...]
"""What the blocks run on, `[B, L, D]` each: the latents; in VACE what is known of them, too."""

Rotary = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines `[1, L, 1, channels of a head]`, one row per token."""

Time: TypeAlias = Any
"""The embedded timestep, in whatever form the adapter that made it wants it back."""


@dataclass(frozen=True, slots=True)
class Grid:
    """How many tokens a latent has along each axis."""

    frames: int
    height: int
    width: int

    @property
    def tokens(self) -> int:
        return self.frames * self.height * self.width


@dataclass(frozen=True, slots=True)
class Geometry:
    """What depends only on the latent's shape."""

    grid: Grid
    rotary: Rotary


@dataclass(frozen=True, slots=True)
class Embeddings:
    """What the branches attend to.

    Attributes:
        prompts: `[B, T, E]` of each prompt along the video, the first one's first.
        negative: `[B, T, E]` of the unconditional branch, if there is one.
    """

    prompts: list[torch.Tensor]
    negative: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Layout:
    """Where in a condition is what.

    Attributes:
        known: channels of the latents of what is known.
        mask: channels of the mask.
        mark: what the mask says of a frame that is known.
    """

    known: slice
    mask: slice
    mark: float


@dataclass(frozen=True, slots=True)
class ImageCondition:
    """What a window is conditioned on, beside its text.

    Attributes:
        latents_BCFHW: goes into the transformer with the noisy latents, in its dtype: a mask, and the latents
            of what is known, with the latents of nothing behind them.
        layout: of its channels.
        tokens_BIE: of an image encoder; the blocks attend to them, too.
    """

    latents_BCFHW: torch.Tensor
    layout: Layout
    tokens_BIE: torch.Tensor | None = None

    def continued_from(self, tail_BCFHW: torch.Tensor) -> ImageCondition:
        """That of a window that begins with these latent frames of the one before.

        They are taken as they are: nothing is decoded and encoded again, so colours do not shift.
        """
        latents_BCFHW, frames = self.latents_BCFHW.clone(), tail_BCFHW.shape[2]
        latents_BCFHW[:, self.layout.known, :frames] = tail_BCFHW
        latents_BCFHW[:, self.layout.mask, :frames] = self.layout.mark
        return replace(self, latents_BCFHW=latents_BCFHW)


class Adapter(Protocol):
    """A transformer as three pieces, embed → blocks → head, that together equal its own forward.

    A step can be cut between them: a forecast step runs only the head, and ranks split the tokens between
    `embed` and `unpatchify`.

    Attributes:
        dtype: what it computes in, whatever its weights are kept in.
    """

    dtype: torch.dtype

    def geometry(self, latents_BCFHW: torch.Tensor) -> Geometry:
        """Token grid and rotary table of latents of this shape."""
        ...

    def text(self, embeddings_BTE: torch.Tensor, image_BIE: torch.Tensor | None = None) -> torch.Tensor:
        """Text encoder output, and that of an image encoder → `[B, T, D]`, what the blocks attend to."""
        ...

    def time(self, timestep_B: torch.Tensor, guidance: float | None = None) -> Time:
        """Embed the timestep, 0 … 1000, of each batch entry.

        Args:
            guidance: the scale, for a transformer that has it embedded; None for one that has not.
        """
        ...

    def embed(self, latents_BCFHW: torch.Tensor, condition_BCFHW: torch.Tensor | None = None) -> Tokens:
        """Latents, and what they are conditioned on, both in the transformer's dtype → tokens."""
        ...

    def branches(
        self, tokens: Tokens, texts_BTD: Sequence[torch.Tensor], time: Time, rotary: Rotary
    ) -> list[torch.Tensor]:
        """Run every block for several texts: tokens → one feature `[B, L, D]` for each text.

        `rotary` holds these tokens' rows. All texts pass a block before the next one is run, whose weights
        may have to be collected. A joint transformer, whose blocks change the text tokens, too, has all of
        those on every rank, and gives the feature of the other tokens.
        """
        ...

    def project(self, feature_BLD: torch.Tensor, time: Time) -> torch.Tensor:
        """Feature → patches `[B, L, P]`, token by token."""
        ...

    def unpatchify(self, patches_BLP: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Projected tokens `[B, L, P]` → velocity `[B, C, F, H, W]`."""
        ...


class AttentionSwitch(Protocol):
    """Who does a transformer's attention over tokens that ranks share."""

    joint: bool
    """Whether text tokens, which every rank has, stand before those that are split; see `attend`."""

    def split(self, attend: Attend) -> None:
        """Let `attend` do it, from now on."""
        ...

    def restore(self) -> None:
        """Let the model do it as it came."""
        ...


def _scale(request: VideoRequest) -> float:
    return request.guidance


@dataclass(frozen=True, slots=True)
class Expert:
    """One of a model's transformers, and the range of timesteps that it is for. Most models have one.

    Attributes:
        name: of its folder, such as `transformer`.
        module: the transformer itself.
        boundary: the lowest timestep that it computes; those below are the next expert's.
        guidance: the scale of a request at its steps.
        history: whether forecasts of the model's output (`velocity`, `guided`) begin `fresh` at its first
            step, or go on from what the expert before has left (`carried`). Features are never mixed.
        warmup: its first steps that are computed, where history begins fresh; at least 1.
    """

    name: str
    adapter: Adapter
    attention: AttentionSwitch
    module: nn.Module
    boundary: float = 0.0
    guidance: Callable[[VideoRequest], float] = _scale
    history: Literal["fresh", "carried"] = "fresh"
    warmup: int = 1
