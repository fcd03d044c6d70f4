"""Files of latents: a finished video as its model sees it, with which a longer one may begin.

Tensor legend: B batch, C latent channels, F latent frames, H, W latent height and width.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from runtime.errors import BadRequestError, reason
from runtime.request.video_request import Continuation

if TYPE_CHECKING:  # it takes seconds
    import torch

_NAME, _FRAMES = "latents", "frames"  # the tensor, and the video's number of frames in the header


@dataclass(frozen=True, slots=True)
class Latents:
    """Clean latents of a video.

    Attributes:
        digest: SHA-256 of their file.
        values_BCFHW: the latents, float32, normalised per channel.
    """

    digest: str
    values_BCFHW: torch.Tensor


def write_latents(path: Path, latents_BCFHW: torch.Tensor, frames: int) -> None:
    """Write clean latents as safetensors.

    Args:
        frames: number of frames of the video.

    Raises:
        OSError: the file cannot be written.
    """
    from safetensors.torch import save

    tensors = {_NAME: latents_BCFHW.float().cpu().contiguous()}
    path.write_bytes(save(tensors, {_FRAMES: str(frames)}))


def continuing(path: str) -> Continuation:
    """Continuation of the video whose latents a file has; only its header is read.

    Raises:
        BadRequestError: it is no such file.
    """
    try:
        with safe_open(path, "pt") as file:
            told = file.metadata() or {}
            return Continuation(file=path, frames=int(told[_FRAMES]))
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise _refusal(path, error) from None


def read_latents(path: str) -> Latents:
    """Read a file of latents.

    Raises:
        BadRequestError: it is no such file, or has other values than finite ones.
    """
    import torch
    from safetensors.torch import load

    try:
        content = Path(path).read_bytes()
        values_BCFHW = load(content)[_NAME]
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise _refusal(path, error) from None
    if values_BCFHW.dtype != torch.float32 or not values_BCFHW.isfinite().all():
        raise _refusal(path, ValueError("its values are not finite float32 numbers"))
    return Latents(hashlib.sha256(content).hexdigest(), values_BCFHW)


def _refusal(path: str, error: Exception) -> BadRequestError:
    if isinstance(error, SafetensorError):
        said = f"it is no file of latents, as --latents writes one beside a video ({reason(error)})"
    else:
        said = "it holds no latents of a video" if isinstance(error, KeyError) else reason(error)
    return BadRequestError(f"extend: {path!r} given; it cannot be extended: {said}")
