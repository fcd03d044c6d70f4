"""Which device a rank uses."""

from __future__ import annotations

import torch

from runtime.errors import BadRequestError


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
