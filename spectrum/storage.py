"""Storage of remembered tensors: on the device where they are computed, or in host memory."""

from __future__ import annotations

import torch


def kept(value: torch.Tensor, storage: torch.device | None) -> torch.Tensor:
    """Move `value` to `storage`; a copy from an accelerator is not waited for."""
    if storage is None or storage == value.device:
        return value
    if storage.type != "cpu" or value.device.type == "cpu":
        return value.to(storage)
    return torch.empty_like(value, device=storage, pin_memory=True).copy_(value, non_blocking=True)


def placed(value: torch.Tensor, storage: torch.device | None, device: torch.device | None) -> torch.Tensor:
    """Move a restored `value` to `storage`, or to `device`; pinned if an accelerator will fetch it."""
    if storage is None or storage.type != "cpu" or device is None or device.type == "cpu":
        return value.to(device=storage or device)
    return value.to(storage).pin_memory()
