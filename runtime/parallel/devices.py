"""Devices: choosing the one that a rank uses, and following its work queue."""

from __future__ import annotations

import os
from collections import deque

import psutil
import torch

from runtime.errors import BadRequestError
from runtime.parallel.heartbeats import host_name

_CROWD = 8  # limit of ranks on one core or accelerator, above which they would make no progress


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """Pick the device called `name`; `auto` is the accelerator, or the CPU if there is none.

    Args:
        name: such as `auto`, `cpu`, `cuda` or `cuda:1`. A name without a number means one accelerator per
            rank; ranks share them if there are too few.
        local_rank: number of this rank on its node.

    Raises:
        BadRequestError: this machine has no such device.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    try:
        device = (accelerator or torch.device("cpu")) if name == "auto" else torch.device(name)
    except RuntimeError:
        raise BadRequestError(
            f"device: {name!r} given; it must be auto, cpu, or a device such as cuda:1"
        ) from None
    if device.type == "cpu":
        return device
    count = torch.accelerator.device_count() if accelerator and accelerator.type == device.type else 0
    if (device.index or 0) >= count:
        raise BadRequestError(f"device: {name!r} given; this machine has {count} {device.type} devices")
    return device if device.index is not None else torch.device(device.type, local_rank % count)


def device_name(device: torch.device) -> str:
    """Name of a device: a GPU's own, such as `NVIDIA H100 80GB HBM3`, or the type of any other."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def identity(device: torch.device) -> str:
    """Identity of a device, which ranks that share it have in common, whatever they call it."""
    own = torch.cuda.get_device_properties(device).uuid if device.type == "cuda" else device
    return f"{host_name()} {own}"


def check_room(ranks: int, device: str) -> str:
    """Make a warning if this machine has fewer cores or accelerators than `ranks`; an empty one if not.

    Args:
        ranks: number of ranks on this machine.
        device: as in the config.

    Raises:
        BadRequestError: it has so few that the ranks would hardly make progress.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True) if device != "cpu" else None
    if accelerator is None:
        room, thing = len(os.sched_getaffinity(0)), "core"
    else:
        room, thing = torch.accelerator.device_count(), f"{accelerator.type} device"
    has = f"ranks: {ranks} given; this machine has {room} {thing}{'s' if room != 1 else ''}"
    if ranks > _CROWD * room:
        raise BadRequestError(f"{has}, and {_CROWD * room} ranks at most may share them")
    return f"{has}, which they share" if ranks > room else ""


def free_memory(device: torch.device) -> int:
    """Bytes of a device that new tensors could take now."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + cached


class DeviceQueue:
    """Progress of an accelerator through its work queue."""

    def __init__(self, device: torch.device):
        self._device = device
        self._marks: deque[torch.Event] = deque()
        self._reached = 0

    def mark(self) -> None:
        """Mark the end of this thread's stream, where a transfer that others wait for begins."""
        event = torch.Event(self._device)
        event.record()
        self._marks.append(event)

    def reached(self) -> int:
        """Number of marks that the accelerator has reached; may be called from another thread than `mark`."""
        while self._marks and self._marks[0].query():
            self._marks.popleft()
            self._reached += 1
        return self._reached
