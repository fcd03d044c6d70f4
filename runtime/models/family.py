"""Model families and loaded models: the interfaces that every family implements.

Tensor legend: B batch, T frames, C latent channels, F latent frames, H, W height and width, 3 colours.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from PIL import Image

from runtime.models.base import Condition, Embeddings, Expert, ExpertSettings
from runtime.models.colours import LatentColours
from runtime.models.layouts.adopted import Adopted
from runtime.models.layouts.given import Given
from runtime.parallel.offloading import Offload
from runtime.parallel.ranks import Ranks
from runtime.parallel.sharding import own_share
from runtime.request.bounds import Bounds
from runtime.request.config import Architecture, Config, Lora
from runtime.request.memory import Memory
from runtime.request.video_request import VideoRequest
from runtime.request.windows import Windows

if TYPE_CHECKING:
    from runtime.models.folder import ModelFolder


class TextEncoder(Protocol):
    """The text encoder of one rank group.

    Attributes:
        warnings: sentences about the part of the last prompt that was truncated, on the first rank.
    """

    warnings: list[str]

    def encode(self, request: VideoRequest) -> Embeddings:
        """Encode the prompts; the embeddings are on every rank's device, in the transformer's dtype."""
        ...


class ImageEncoder(Protocol):
    """Encoder of a model's conditioning beside its text, for one rank group."""

    def encode(
        self, request: VideoRequest, image: Image.Image | None, noise_BCFHW: torch.Tensor
    ) -> Condition:
        """Encode the conditioning of the request's first window; every rank gets it.

        Args:
            image: image of the request, on the first rank; None if it has none.
            noise_BCFHW: initial noise of the window.
        """
        ...


class At(Protocol):
    """Callback that hears whether a rank is doing work of its own (`busy`) or a transfer."""

    def __call__(self, *, busy: bool) -> None: ...


class Decoder(Protocol):
    """Decoder of latents into frames (a VAE), for one rank group."""

    def frames(self, latents_BCFHW: torch.Tensor, at: At) -> Generator[torch.Tensor]:
        """Decode denoised latents, the same on every rank, into frames in temporal order.

        Every rank iterates to the end, or closes the generator.

        Args:
            latents_BCFHW: the denoised latents.
            at: called whenever this rank changes between work of its own and a transfer.

        Yields:
            Frames `[B, T, H, W, 3]` in [0, 1] on the first rank; nothing on the others.
        """
        ...


class Loras(Protocol):
    """The LoRAs of a loaded model, on one rank.

    Attributes:
        merged: revision of the model that its weights are now; empty if changing them was interrupted.
    """

    merged: str

    def switch(self, folder: ModelFolder) -> None:
        """Change the loaded weights to those that a model loaded from `folder` has, to the bit; collective.

        Args:
            folder: the loaded model, with the LoRAs that it is to have.

        Raises:
            BadRequestError: a LoRA cannot be merged; raised on every rank, before any weight is changed.
        """
        ...


def _stays(memory: Memory) -> None:
    """Leave everything where it is."""


@dataclass(frozen=True, slots=True)
class Model:
    """A loaded model, on one rank.

    Attributes:
        experts: transformers in the order of their steps: the first denoises the first steps. Missing ones
            are left out.
        text, decoder: its text encoder and its VAE.
        image: encoder of its other conditioning; None for a model that is conditioned on text alone.
        colours: colours of its latents, for previews; called on the first rank only, and slow the first time.
            None if they are unknown.
        offload: where the experts' blocks are, if they are offloaded; None if all stay on the device.
        loras: its LoRAs, which can be switched; None for a family that takes none.
        rest: has the text encoder and the VAE be where memory options say while they are not used, from now
            on; called on every rank when options that are `auto` have been decided.
    """

    experts: tuple[Expert, ...]
    text: TextEncoder
    decoder: Decoder
    image: ImageEncoder | None = None
    colours: Callable[[], LatentColours] | None = None
    offload: Offload | None = None
    loras: Loras | None = None
    rest: Callable[[Memory], None] = _stays

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype of the transformers; all have the same."""
        return self.experts[0].adapter.dtype

    @property
    def weight_bytes(self) -> int:
        """Most bytes of the transformers' weights that were on this rank's device at one time; of sharded
        blocks, its shards."""
        offload = self.offload
        weights = [one for expert in self.experts for one in expert.module.parameters()]
        kept = [own_share(one) for one in weights if offload is None or not offload.holds(one)]
        brought = 0 if offload is None else offload.peak
        return sum(one.numel() * one.element_size() for one in kept) + brought


class Sizes(Protocol):
    """Sizes of a model's latents, from its settings; no weights are needed.

    Attributes:
        architecture: shape of its transformers; all have the same.
    """

    @property
    def architecture(self) -> Architecture: ...

    def shape(self, request: VideoRequest) -> tuple[int, ...]:
        """Shape of the latents: `[B, C, F, H, W]`."""
        ...

    def tokens(self, request: VideoRequest) -> int:
        """Number of tokens of one video that are split over ranks.

        Raises:
            BadRequestError: the video does not fill whole tokens, or a token would have no position.
        """
        ...

    def windows(self, request: VideoRequest, config: Config) -> Windows:
        """Windows of the video that the model sees one at a time."""
        ...


class Family(Protocol):
    """A model family: everything that is particular to it. A stateless object, found by the registry.

    Files that are imported before a model is loaded import neither diffusers nor transformers at their top.

    Attributes:
        name: name for messages.
        bounds: bounds of a request.
    """

    name: str
    bounds: Bounds

    def adopt(self, given: Given) -> Adopted | None:
        """Recognise a model of this family in weight files of another layout; None if they hold none.

        Only headers are read.

        Raises:
            OSError, ValueError: they hold one that is incomplete or not supported; the message says what was
                seen in them.
        """
        ...

    def check(self, path: Path, pipeline: str, expected: Architecture | None) -> None:
        """Check that a folder holds a complete model; only headers and settings are read.

        Args:
            path: the folder.
            pipeline: class of its pipeline, from `model_index.json`.
            expected: shape that its transformers should have; None for any.

        Raises:
            OSError, ValueError, SafetensorError: a file is missing or corrupt, or contradicts another.
        """
        ...

    def usual_config(self, path: Path, pipeline: str) -> Config:
        """Config that a model of its kind and size is usually run with, whatever `model` it names.

        Args:
            path: folder with the model's settings; its weights may be missing.
            pipeline: class of its pipeline, from `model_index.json`.

        Raises:
            OSError, ValueError: a file is missing or invalid.
        """
        ...

    def read_lora(self, lora: Lora) -> str:
        """Check a LoRA for any model of this family; return the digest of its file's content.

        Raises:
            BadRequestError: it is no LoRA for this family, or a part of it would not be used.
        """
        ...

    def fit_lora(self, lora: Lora, path: Path, pipeline: str) -> str:
        """Check that a LoRA fits the model in `path`; return the digest of its file's content.

        Raises:
            BadRequestError: it does not fit.
        """
        ...

    def refuses(self, folder: ModelFolder, request: VideoRequest) -> str:
        """Reason why a model cannot serve a request, whatever its weights; empty if it can."""
        ...

    def sizes(self, folder: ModelFolder) -> Sizes:
        """Sizes of a model's latents."""
        ...

    def experts(self, folder: ModelFolder) -> tuple[ExpertSettings, ...]:
        """Settings of a model's transformers, in the order of their steps; missing ones are among them."""
        ...

    def timesteps(self, settings: Mapping[str, Any], steps: int, tokens: int) -> dict[str, Any]:
        """Arguments of a sampler's `set_timesteps` beside the number of steps, such as `mu` where the shift
        depends on the number of tokens.

        Args:
            settings: settings of the sampler.
            steps: number of steps.
            tokens: number of tokens of one video that are split over ranks.
        """
        ...

    def load(self, folder: ModelFolder, config: Config, ranks: Ranks) -> Model:
        """Load a model on every rank's device, with the folder's LoRAs. Every rank calls it at the same time.

        Raises:
            BadRequestError: the weights do not fit the settings beside them, or are not finite; or the family
                cannot do what `config.performs` asks for.
        """
        ...
