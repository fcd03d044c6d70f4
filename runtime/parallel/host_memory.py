"""Host memory that a device reads at bus speed."""

from __future__ import annotations

import logging
import weakref

import torch
from torch.cuda._pin_memory_utils import pin_memory, unpin_memory

log = logging.getLogger(__name__)

_PAGE = 4096


def host_memory(size: int, device: torch.device) -> torch.Tensor:
    """Allocate `size` bytes of host memory, pinned if `device` is an accelerator.

    For CUDA whole pages are registered: torch's allocator of pinned memory rounds sizes up to powers of two.
    """
    if device.type == "cpu":
        return torch.empty(size, dtype=torch.uint8)
    if device.type == "cuda":
        try:
            return _registered(size, device)
        except RuntimeError as error:
            log.warning("pinned memory comes from torch's allocator, which rounds up: %s", error)
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


def _registered(size: int, device: torch.device) -> torch.Tensor:
    length = -(-size // _PAGE) * _PAGE
    room = torch.empty(length + _PAGE, dtype=torch.uint8)
    whole = room.narrow(0, -room.data_ptr() % _PAGE, length)
    pin_memory(whole.data_ptr(), length)
    memory = whole.narrow(0, 0, size)
    weakref.finalize(memory, _release, whole, device).atexit = False
    return memory


def _release(whole: torch.Tensor, device: torch.device) -> None:
    torch.cuda.synchronize(device)  # a copy may still be reading
    unpin_memory(whole.data_ptr())
