"""Input files of a request, which the first rank alone reads: the others may be on machines without them.

Tensor legend: B batch, C latent channels, F latent frames, H, W latent height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch

from runtime.errors import BadRequestError
from runtime.media.latents import Latents, read_latents
from runtime.parallel.ranks import Ranks
from runtime.request.images import Picture, read_picture
from runtime.request.video_request import VideoRequest


class _Content(Protocol):
    """Content of a file."""

    @property
    def digest(self) -> str: ...


_Read = TypeVar("_Read", bound=_Content)


class Inputs:
    """Reads the input files of requests for one rank group. All ranks call its methods at the same time."""

    def __init__(self, ranks: Ranks):
        self._ranks = ranks
        self._picture: Picture | None = None

    @contextmanager
    def held(self, request: VideoRequest) -> Iterator[None]:
        """Read the request's image on the first rank; while the block runs, generations use that copy.

        Raises:
            BadRequestError: the image cannot be used.
        """
        if request.image is not None and self._ranks.is_leader:
            self._picture = read_picture(request.image)
        try:
            yield
        finally:
            self._picture = None

    def image(self, request: VideoRequest) -> tuple[Picture | None, str]:
        """Return the request's image on the first rank, and its digest on all; empty without an image.

        Raises:
            BadRequestError: the image cannot be used; raised on every rank.
        """
        held, path = self._picture, request.image
        if path is None:
            return None, ""
        return self._first(lambda: held if held and held.path == path else read_picture(path))

    def extended(self, request: VideoRequest, shape: Sequence[int]) -> tuple[Latents | None, str]:
        """Return the latents of the video that the request extends, as `image` does its image.

        Args:
            shape: `[B, C, F, H, W]` that such a video's latents have.

        Raises:
            BadRequestError: they cannot be read, or are those of another size, length or model; raised on
                every rank.
        """
        before = request.extend
        return (None, "") if before is None else self._first(lambda: _latents(before.file, shape))

    def broadcast(self, own: Latents | None) -> torch.Tensor:
        """Give the first rank's latents `[B, C, F, H, W]` to all, on their devices."""
        tensors = [] if own is None else [own.values_BCFHW.to(self._ranks.device)]
        [latents_BCFHW] = self._ranks.broadcast_tensors(tensors, torch.float32)
        return latents_BCFHW

    def _first(self, read: Callable[[], _Read]) -> tuple[_Read | None, str]:
        """Read on the first rank, and return the digest, or refuse, on all."""
        found, told = None, {}
        if self._ranks.is_leader:
            try:
                found = read()
                told = {"digest": found.digest}
            except BadRequestError as error:
                told = {"problem": str(error)}
        told = self._ranks.control.all_gather_object(told)[0]
        if "problem" in told:
            raise BadRequestError(told["problem"])
        return found, told["digest"]


def _latents(file: str, shape: Sequence[int]) -> Latents:
    found = read_latents(file)
    if tuple(found.values_BCFHW.shape) != tuple(shape):
        made, needed = ("×".join(map(str, one)) for one in (found.values_BCFHW.shape, shape))
        raise BadRequestError(
            f"extend: {file!r} given; its latents are {made}, and such a video has {needed}: a video is "
            "extended by the same model, in the same size"
        )
    return found
