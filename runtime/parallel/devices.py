"""Which device a rank uses."""

from __future__ import annotations

import os
from collections import deque

import torch

from runtime.errors import BadRequestError

_CROWD = 8  # ranks on one core or accelerator, above which nothing would ever come of them


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """The device called `name`; `auto` is the accelerator, or the CPU where there is none.

    Args:
        local_rank: number of this rank on its node. A name without a number means one accelerator per rank,
            as far as there are enough; after that they are shared.

    Raises:
        BadRequestError: there is no such device on this machine.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    try:
        device = (accelerator or torch.device("cpu")) if name == "auto" else torch.device(name)
    except RuntimeError:
        raise BadRequestError(
            f"device: {name!r} given; it must be auto, cpu, or such as cuda or cuda:1"
        ) from None
    if device.type == "cpu":
        return device
    count = torch.accelerator.device_count() if accelerator and accelerator.type == device.type else 0
    if (device.index or 0) >= count:
        raise BadRequestError(f"device: {name!r} given; this machine has {count} {device.type} devices")
    return device if device.index is not None else torch.device(device.type, local_rank % count)


def check_room(ranks: int, device: str) -> str:
    """A warning where this machine has fewer cores or accelerators than `ranks`; empty where it has enough.

    Args:
        device: as in the config.

    Raises:
        BadRequestError: it has so few that they would hardly get anywhere.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True) if device != "cpu" else None
    if accelerator is None:
        room, thing = len(os.sched_getaffinity(0)), "core"
    else:
        room, thing = torch.accelerator.device_count(), f"{accelerator.type} device"
    has = f"ranks: {ranks} given; this machine has {room} {thing}{'s' if room != 1 else ''}"
    if ranks > _CROWD * room:
        raise BadRequestError(f"{has}, and {_CROWD * room} ranks at most may share them")
    return f"{has}, which they take turns on" if ranks > room else ""


class DeviceQueue:
    """How far an accelerator has come with what it was given to do."""

    def __init__(self, device: torch.device):
        self._device = device
        self._marks: deque[torch.Event] = deque()
        self._reached = 0

    def mark(self) -> None:
        """Something that other ranks wait for begins here, in this thread's stream."""
        event = torch.Event(self._device)
        event.record()
        self._marks.append(event)

    def reached(self) -> int:
        """How many of these the accelerator has come to. For one thread, which need not be the one above."""
        while self._marks and self._marks[0].query():
            self._marks.popleft()
            self._reached += 1
        return self._reached
