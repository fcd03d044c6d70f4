"""Weighted sums of tensors of one shape, on the CPU and on accelerators, also of values on the host."""

from __future__ import annotations

from collections.abc import Iterator

import torch

_CHUNK_CPU = 65_536  # elements per value: 14 values in float32 are 3.7 MB
_CHUNK_ACCELERATOR = 2**26  # elements: 256 MiB of float32 beside the result


def weighted_sum(
    weights: list[float], values: list[torch.Tensor], device: torch.device | None = None
) -> torch.Tensor:
    """Σ weights[k] · values[k] in float32 (float64 for float64 values), rounded once to the values' dtype.

    float32 weights matter: rounded to bfloat16, weights of opposite sign no longer cancel.

    Args:
        device: device of the sum, by default that of the values. Neither an accelerator nor the host waits
            for the other.
    """
    first = values[0]
    device = first.device if device is None else device
    flat = [value.reshape(-1) for value in values]
    result = torch.empty(first.numel(), dtype=first.dtype, device=device)
    (_sum_on_cpu if device.type == "cpu" else sum_on_accelerator)(result, weights, flat)
    return result.view(first.shape)


def _sum_on_cpu(result: torch.Tensor, weights: list[float], flat: list[torch.Tensor]) -> None:
    """Sum in chunks that stay in cache: each value is read from memory once, with no K-fold temporary."""
    wide = torch.promote_types(result.dtype, torch.float32)
    size = result.numel()
    chunk = min(size, _CHUNK_CPU)
    weights_K = torch.tensor(weights, dtype=wide)
    block = torch.empty(len(flat), chunk, dtype=wide)
    for start in range(0, size, max(chunk, 1)):
        part = block[:, : min(chunk, size - start)]
        for row, value in zip(part, flat, strict=True):
            row.copy_(value[start : start + part.shape[1]])
        result[start : start + part.shape[1]] = weights_K @ part


def sum_on_accelerator(
    result: torch.Tensor, weights: list[float], flat: list[torch.Tensor], chunk: int = _CHUNK_ACCELERATOR
) -> None:
    """Sum with one launch per value; weights are arguments of launches, so nothing is copied to the device.

    Args:
        result: output, 1-dim, on the device.
        weights: one for each value.
        flat: values, 1-dim, on the device or in host memory.
        chunk: elements summed at a time.
    """
    wide = torch.promote_types(result.dtype, torch.float32)
    size = result.numel()
    for start in range(0, size, chunk):
        part = result[start : start + chunk]
        total = torch.zeros(part.numel(), dtype=wide, device=result.device)
        pieces = [value[start : start + chunk] for value in flat]
        here = flat[0].device == result.device
        for weight, piece in zip(weights, pieces if here else fetched(pieces, result.device), strict=True):
            total.add_(piece, alpha=weight)
        part.copy_(total)


def fetched(pieces: list[torch.Tensor], device: torch.device) -> Iterator[torch.Tensor]:
    """Yield each of `pieces`, all of one size and dtype, on `device`, copied while the one before is in use.

    A piece is valid until the next one is requested. Copies run on a stream of their own, at bus speed if
    `pieces` lie in pinned memory; the caller's current stream waits for them, the host does not.
    """
    module = torch.get_device_module(device)
    with torch.accelerator.device_index(device.index):  # which need not be the process's current one
        using, copying = module.current_stream(), module.Stream()
    copying.wait_stream(using)  # the buffers' memory may be what the current stream has just let go of
    buffers = [torch.empty_like(pieces[0], device=device) for _ in pieces[:2]]
    arrived, done = ([module.Event() for _ in buffers] for _ in range(2))

    def send(number: int) -> None:
        slot = number % 2
        with module.stream(copying):
            if number >= 2:
                copying.wait_event(done[slot])
            buffers[slot].copy_(pieces[number], non_blocking=True)
            arrived[slot].record(copying)

    send(0)
    for number in range(len(pieces)):
        if number + 1 < len(pieces):
            send(number + 1)
        using.wait_event(arrived[number % 2])
        yield buffers[number % 2]
        done[number % 2].record(using)
