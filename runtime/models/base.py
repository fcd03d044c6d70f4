"""Interface between sampling and a model of any family: adapters, experts, and their inputs.

Tensor legend: B batch, L tokens, S those of this rank, D channels of the transformer, T text tokens, E
channels of an encoder, I image tokens, C latent channels, F latent frames, H, W latent height and width, P
values of a token's patch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import nn

from runtime.parallel.attention import Attend
from runtime.request.video_request import VideoRequest

Tokens: TypeAlias = tuple[torch.Tensor, ...]
"""Input of the transformer blocks, `[B, L, D]` each: the latents and, for VACE, the control latents."""

Rotary = tuple[torch.Tensor, torch.Tensor]
"""Rotary position embedding: cosines and sines `[1, L, 1, channels of a head]`, one row per token."""

Time: TypeAlias = Any
"""Embedded timestep; its type is private to the adapter that made it."""


@dataclass(frozen=True, slots=True)
class Grid:
    """Number of tokens of a latent along each axis."""

    frames: int
    height: int
    width: int

    @property
    def tokens(self) -> int:
        return self.frames * self.height * self.width


@dataclass(frozen=True, slots=True)
class Geometry:
    """Token grid and rotary table of latents; both depend only on their shape."""

    grid: Grid
    rotary: Rotary


@dataclass(frozen=True, slots=True)
class Embeddings:
    """Text embeddings of a request, from the text encoder.

    Attributes:
        prompts: `[B, T, E]` for each prompt along the video, in order.
        negative: `[B, T, E]` for the unconditional branch, if there is one.
    """

    prompts: list[torch.Tensor]
    negative: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Layout:
    """Channel layout of the conditioning tensor.

    Attributes:
        known: channels of the known frames' latents.
        mask: channels of the mask.
        mark: value of the mask at a known frame.
    """

    known: slice
    mask: slice
    mark: float


@dataclass(frozen=True, slots=True)
class Condition(ABC):
    """Conditioning of a window beside its text.

    Attributes:
        latents_BCFHW: input of the transformer beside the noisy latents; see `Adapter.embed`.
        tokens_BIE: output of an image encoder, which the blocks attend to as well.
    """

    latents_BCFHW: torch.Tensor
    tokens_BIE: torch.Tensor | None = None

    @property
    def known(self) -> torch.Tensor | None:
        """Clean latents of the first frames that are not denoised at all, in float32; None if all are."""
        return None

    @abstractmethod
    def continued_from(self, tail_BCFHW: torch.Tensor) -> Condition:
        """Conditioning of a window that begins with the last latent frames of the one before.

        The latents are used as they are: nothing is decoded and encoded again, so colours do not shift.

        Args:
            tail_BCFHW: those latent frames.
        """


@dataclass(frozen=True, slots=True)
class ImageCondition(Condition):
    """Conditioning by channels beside the noisy latents, in the transformer's dtype.

    They are a mask, and the latents of the known frames, padded with those of empty frames.

    Attributes:
        layout: layout of the channels.
    """

    layout: Layout = field(kw_only=True)

    def continued_from(self, tail_BCFHW: torch.Tensor) -> ImageCondition:
        """Mark the first frames as known, with `tail_BCFHW`; see `Condition`."""
        latents_BCFHW, frames = self.latents_BCFHW.clone(), tail_BCFHW.shape[2]
        latents_BCFHW[:, self.layout.known, :frames] = tail_BCFHW
        latents_BCFHW[:, self.layout.mask, :frames] = self.layout.mark
        return replace(self, latents_BCFHW=latents_BCFHW)


@dataclass(frozen=True, slots=True)
class KnownFrames(Condition):
    """Conditioning by frames that are known: they take the place of the first noisy ones, at timestep 0.

    It is for transformers whose tokens are of one latent frame each, and of a timestep each. The latents are
    those of the known frames, in float32; there are 0 frames if nothing is known.
    """

    @property
    def known(self) -> torch.Tensor | None:
        """Latents of the known frames; see `Condition`."""
        return self.latents_BCFHW if self.latents_BCFHW.shape[2] else None

    def continued_from(self, tail_BCFHW: torch.Tensor) -> KnownFrames:
        """Make the frames of `tail_BCFHW` the known ones; see `Condition`."""
        return KnownFrames(tail_BCFHW)


class Adapter(Protocol):
    """A transformer in three pieces, embed → blocks → head, that together equal its own forward.

    A step can be cut between them: a forecast step runs only the head, and ranks split the tokens between
    `embed` and `unpatchify`.

    Attributes:
        dtype: compute dtype, which may differ from the dtype that its weights are stored in.
    """

    dtype: torch.dtype

    def geometry(self, latents_BCFHW: torch.Tensor) -> Geometry:
        """Token grid and rotary table of latents of this shape."""
        ...

    def text(self, embeddings_BTE: torch.Tensor, image_BIE: torch.Tensor | None = None) -> torch.Tensor:
        """Project the text and image encoders' outputs to `[B, T, D]`, for cross-attention."""
        ...

    def time(
        self,
        timestep_B: torch.Tensor,
        guidance: float | None = None,
        known_1S1: torch.Tensor | None = None,
    ) -> Time:
        """Embed the timestep, 0 … 1000, of each batch entry.

        Args:
            guidance: guidance scale, for a transformer that embeds it; None for others.
            known_1S1: which of this rank's tokens are of known frames, so that their timestep is 0; None if
                none is, as always with conditioning other than `KnownFrames`.
        """
        ...

    def embed(self, latents_BCFHW: torch.Tensor, condition_BCFHW: torch.Tensor | None = None) -> Tokens:
        """Embed latents and their conditioning as tokens.

        Args:
            latents_BCFHW: noisy latents, in the transformer's dtype.
            condition_BCFHW: `Condition.latents_BCFHW`.
        """
        ...

    def expect(self) -> None:
        """Begin to bring the blocks' weights to the device, if they are elsewhere: the blocks run next."""
        ...

    def branches(
        self, tokens: Tokens, texts_BTD: Sequence[torch.Tensor], time: Time, rotary: Rotary
    ) -> list[torch.Tensor]:
        """Run every block for several texts; return one feature `[B, L, D]` for each text.

        All texts pass a block before the next one runs, so that sharded weights are gathered once. A joint
        transformer, whose blocks also change the text tokens, has all of those on every rank, and returns
        the feature of the other tokens.

        Args:
            tokens: this rank's tokens.
            texts_BTD: one text for each branch, from `text`.
            time: embedded timestep, from `time`.
            rotary: rows of the rotary table for these tokens.
        """
        ...

    def project(self, feature_BLD: torch.Tensor, time: Time) -> torch.Tensor:
        """Project a feature to patches `[B, L, P]`, token by token."""
        ...

    def unpatchify(self, patches_BLP: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Rearrange patches `[B, L, P]` of all tokens to a velocity `[B, C, F, H, W]`."""
        ...


class AttentionSwitch(Protocol):
    """Switch between a transformer's own attention and attention over tokens that are split over ranks."""

    joint: bool
    """Whether text tokens, which every rank has, precede the tokens that are split; see `attend`."""

    def split(self, attend: Attend) -> None:
        """Run self-attention with `attend` from now on."""
        ...

    def restore(self) -> None:
        """Run the model's own attention from now on."""
        ...


def _scale(request: VideoRequest) -> float:
    return request.guidance


@dataclass(frozen=True, slots=True)
class ExpertSettings:
    """Settings of an expert: what is known of one of a model's transformers before its weights are loaded.

    Attributes:
        name: name of its folder, such as `transformer`.
        boundary: lowest timestep that it computes; lower ones belong to the next expert.
        guidance: guidance scale of a request at its steps.
        history: history from which the model's output (`velocity`, `guided`) is forecast: `fresh` begins
            anew at its first step, `carried` keeps the previous expert's. Features are never mixed.
        warmup: number of its first steps that are computed where history is fresh; at least 1.
        present: whether the model has its weights. Requests with steps of a missing expert are refused.
    """

    name: str
    boundary: float = 0.0
    guidance: Callable[[VideoRequest], float] = _scale
    history: Literal["fresh", "carried"] = "fresh"
    warmup: int = 1
    present: bool = True


@dataclass(frozen=True, slots=True)
class Expert:
    """One of a model's transformers, with its weights. Most models have one.

    Attributes:
        settings: its settings, among them the range of timesteps that it is for.
        adapter, attention: its three pieces, and the switch of its attention.
        module: the transformer itself.
    """

    settings: ExpertSettings
    adapter: Adapter
    attention: AttentionSwitch
    module: nn.Module

    @property
    def name(self) -> str:
        """Name of its folder, such as `transformer`."""
        return self.settings.name
