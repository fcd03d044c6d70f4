"""What a model family is, and what a loaded model is: nothing here knows a particular model.

Tensor legend: B batch, T frames, C latent channels, F latent frames, H, W height and width, 3 colours.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from PIL import Image

from runtime.models.base import Embeddings, Expert, ImageCondition
from runtime.models.colours import LatentColours
from runtime.parallel.ranks import Ranks
from runtime.request.bounds import Bounds
from runtime.request.config import Architecture, Config, Lora
from runtime.request.video_request import VideoRequest
from runtime.request.windows import Windows

if TYPE_CHECKING:
    from runtime.models.folder import ModelFolder


class TextEncoder(Protocol):
    """The text encoder of one rank group.

    Attributes:
        warnings: sentences about words of the last prompt that do not count, on the first rank.
    """

    warnings: list[str]

    def encode(self, request: VideoRequest) -> Embeddings:
        """The prompts' embeddings, on every rank's device, in the transformer's dtype."""
        ...


class ImageEncoder(Protocol):
    """Encodes what a model is conditioned on beside its text, for one rank group."""

    def encode(
        self, request: VideoRequest, image: Image.Image | None, noise_BCFHW: torch.Tensor
    ) -> ImageCondition:
        """Encode what the request's first window is conditioned on; every rank gets it.

        Args:
            image: the request's, on the first rank; None if it has none.
            noise_BCFHW: the window's.
        """
        ...


class At(Protocol):
    """Hears what a rank is at: work of its own (`busy`), or a transfer."""

    def __call__(self, *, busy: bool) -> None: ...


class Decoder(Protocol):
    """Latents → frames (a VAE), for one rank group."""

    def frames(self, latents_BCFHW: torch.Tensor, at: At) -> Generator[torch.Tensor]:
        """Decode denoised latents, the same on every rank, into frames in temporal order.

        Every rank iterates to the end, or closes it.

        Args:
            at: told whether this rank is at work of its own or at a transfer, whenever that changes.

        Yields:
            Frames `[B, T, H, W, 3]` in [0, 1] on the first rank; nothing on the others.
        """
        ...


@dataclass(frozen=True, slots=True)
class Model:
    """A loaded model, on one rank.

    Attributes:
        experts: in the order in which they take their steps: the first begins, the last ends.
        image: None for a model that is conditioned on text alone.
        colours: for previews, how its latents look; asked on the first rank only, and takes long the first
            time. None if that is unknown.
    """

    experts: tuple[Expert, ...]
    text: TextEncoder
    decoder: Decoder
    image: ImageEncoder | None = None
    colours: Callable[[], LatentColours] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """What the transformers compute in; all the same."""
        return self.experts[0].adapter.dtype


class Sizes(Protocol):
    """What a model makes of pixels, by its settings; no weights are needed.

    Attributes:
        architecture: of its transformers, all the same.
    """

    @property
    def architecture(self) -> Architecture: ...

    def shape(self, request: VideoRequest) -> tuple[int, ...]:
        """Shape of the latents: `[B, C, F, H, W]`."""
        ...

    def tokens(self, request: VideoRequest) -> int:
        """Tokens of one video that ranks share; it must fill whole ones, each of which has a position.

        Raises:
            BadRequestError: it does not, or there is none.
        """
        ...

    def windows(self, request: VideoRequest, config: Config) -> Windows:
        """What of it the model sees at a time."""
        ...


class Family(Protocol):
    """A kind of model: everything that is particular to it. One object without state, found by the registry.

    What is asked for before a model is loaded imports neither diffusers nor transformers at the top of its
    file.

    Attributes:
        name: for messages.
        bounds: of a request.
    """

    name: str
    bounds: Bounds

    def foreign(self, path: Path) -> str:
        """What a folder without `model_index.json` is, if it is one of this family's in another layout, and
        what to do about it; empty if it is none."""
        ...

    def check(self, path: Path, pipeline: str, expected: Architecture | None) -> None:
        """Make sure that a folder holds a whole model; only headers and settings are read.

        Args:
            pipeline: its class, by `model_index.json`.
            expected: what its transformers should be.

        Raises:
            OSError, ValueError, SafetensorError: a file is missing, corrupt, or not what another says it is.
        """
        ...

    def read_lora(self, lora: Lora) -> str:
        """The digest of a LoRA for models of this family, whichever they are, as a word for a revision.

        Raises:
            BadRequestError: it does not, or a part of it would not be used.
        """
        ...

    def fit_lora(self, lora: Lora, path: Path, pipeline: str) -> str:
        """As `read_lora`, of a LoRA that fits the model in `path`.

        Raises:
            BadRequestError: it does not fit.
        """
        ...

    def refuses(self, folder: ModelFolder, request: VideoRequest) -> str:
        """Why a model cannot serve a request, whatever its weights; empty if it can."""
        ...

    def sizes(self, folder: ModelFolder) -> Sizes:
        """What a model makes of pixels."""
        ...

    def timesteps(self, settings: Mapping[str, Any], steps: int, tokens: int) -> dict[str, Any]:
        """What a sampler's `set_timesteps` is given beside the number of steps, such as `mu` where its shift
        depends on the number of tokens.

        Args:
            settings: of the sampler.
            tokens: of one video that ranks share.
        """
        ...

    def load(self, folder: ModelFolder, config: Config, ranks: Ranks) -> Model:
        """The model on every rank's device. Every rank calls it at the same time.

        Raises:
            BadRequestError: the weights do not fit the settings beside them, or are not numbers.
        """
        ...
