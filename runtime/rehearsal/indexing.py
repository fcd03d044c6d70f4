"""Indexing of fake tensors on a device that torch is not built for: `x[…]` needs the device, views do not."""

from __future__ import annotations

from typing import Any

import torch


def get(tensor: torch.Tensor, index: Any) -> torch.Tensor:
    """Return `tensor[index]`; `index` may hold integers, slices, `None`, an ellipsis and tensors."""
    entries = _entries(tensor, index)
    picked: list[torch.Tensor | None] = []
    axis = 0
    for entry in entries:
        if entry is None:
            tensor = tensor.unsqueeze(axis)
        elif isinstance(entry, slice):
            if entry != slice(None):
                start, stop = entry.start or 0, 2**63 - 1 if entry.stop is None else entry.stop
                tensor = torch.ops.aten.slice.Tensor(tensor, axis, start, stop, entry.step or 1)
        elif isinstance(entry, torch.Tensor) and entry.ndim:
            picked += [None] * (axis - len(picked)) + [entry]
        else:
            tensor = tensor.select(axis, int(entry))
            continue
        axis += 1
    return torch.ops.aten.index.Tensor(tensor, picked) if picked else tensor


def put(tensor: torch.Tensor, index: Any, value: Any) -> None:
    """Assign `tensor[index] = value`; `index` may not hold tensors."""
    there = get(tensor, index)
    if isinstance(value, torch.Tensor):
        torch.ops.aten.copy_.default(there, value)
    else:
        there.fill_(value)


def _entries(tensor: torch.Tensor, index: Any) -> list[Any]:
    """List one entry for each axis of an index, with the ellipsis expanded."""
    given = list(index) if isinstance(index, tuple) else [index]
    named = sum(entry is not None and entry is not Ellipsis for entry in given)
    at = next((place for place, entry in enumerate(given) if entry is Ellipsis), None)
    if at is not None:
        given[at : at + 1] = [slice(None)] * (tensor.ndim - named)
    return given
