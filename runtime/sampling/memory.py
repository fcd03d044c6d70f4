"""Memory: the least that a request needs, and an explanation when there is none left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import psutil
import torch

from runtime.errors import BadRequestError, JobFailedError, reason
from runtime.parallel.devices import free_memory, identity
from runtime.parallel.ranks import Ranks
from runtime.request.memory import Memory

_T = TypeVar("_T")
_LATENTS = 3  # noise, latents and velocity of the whole video, in float32
_REMEDY = "reduce size, frames or videos, set `window` in the config, or split the video over more ranks"


@dataclass(frozen=True, slots=True)
class Need:
    """Lower bound of the memory that a rank needs, in bytes.

    Attributes:
        latents: bytes for latents of the whole video.
        activations: bytes for activations of one transformer block, for this rank's tokens of one window.
    """

    latents: int
    activations: int

    @classmethod
    def of(cls, latents: int, tokens: int, width: int, ffn_dim: int, itemsize: int) -> Need:
        """Compute the need of a request.

        Args:
            latents: number of elements in the latents of all videos.
            tokens: tokens of one window of all videos, on this rank.
            width: channels of a token.
            ffn_dim: channels of the block's feed-forward layer.
            itemsize: bytes of an activation.
        """
        return cls(_LATENTS * 4 * latents, tokens * (4 * width + ffn_dim) * itemsize)

    def check(self, device: torch.device, asked: str) -> None:
        """Refuse a request that cannot fit the device.

        Args:
            device: this rank's device.
            asked: description of the request, for the message.

        Raises:
            BadRequestError: it needs more memory than the device has.
        """
        there = memory_of(device)
        if self.latents + self.activations > there:
            raise BadRequestError(
                f"{asked}: needs at least {_gb(self.latents)} for latents and {_gb(self.activations)} for "
                f"one block's activations on each rank, and {device} has {_gb(there)}; {_REMEDY}"
            )


class Places:
    """Where the idle weights of a loaded model are, and what decides that where its config does not.

    Make it before the model is loaded. Collective.

    Args:
        memory: memory options of the config.
        ranks: the ranks that share the model.

    Attributes:
        memory: the options, with what is `auto` decided: kept on a CPU, and offloaded elsewhere until a job
            decides it.
        room: bytes of this rank's GPU that were free for it; ranks on one GPU share them. None if there is
            nothing to decide, as on a CPU.
        host: bytes of host memory that were free.
    """

    def __init__(self, memory: Memory, ranks: Ranks):
        at_first = "keep" if ranks.device.type == "cpu" else "offload"
        self.memory = memory.decided(text_encoder=at_first, vae=at_first)
        self.host = free_memory(torch.device("cpu"))
        self.room: int | None = None
        if ranks.device.type == "cuda" and memory.undecided:
            free, own = free_memory(ranks.device), identity(ranks.device)
            self.room = free // ranks.control.all_gather_object(own).count(own)  # before any loads


def memory_of(device: torch.device) -> int:
    """Total memory of a device in bytes, used or not."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total)


def peak_of(device: torch.device) -> int | None:
    """Most bytes that torch has allocated on a GPU at one time since the process began; None for a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


@contextmanager
def shortage_explained(device: torch.device, what: str) -> Iterator[None]:
    """Turn a failed allocation into an error that says what to do.

    Args:
        device: this rank's device.
        what: description of the work, for the message.

    Raises:
        JobFailedError: memory ran out while the block ran.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _is_shortage(error):
            raise
        raise JobFailedError(f"{what}: {device} ran out of memory ({reason(error)}); {_REMEDY}") from error


def if_room(make: Callable[[], _T]) -> _T | None:
    """Return what `make` returns; None if memory runs out meanwhile."""
    try:
        return make()
    except (RuntimeError, MemoryError) as error:
        if not _is_shortage(error):
            raise
        return None


def _is_shortage(error: Exception) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _gb(count: int) -> str:
    return f"{count / 1e9:,.1f} GB"
