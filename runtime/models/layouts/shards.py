"""Safetensors files written tensor by tensor, so that none of them is held in memory as a whole."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from runtime.files.atomic import PlainFile

_CODES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
_ALIGNED = 8  # bytes of which the header's length is a multiple


@dataclass(frozen=True, slots=True)
class Slot:
    """A tensor that is to be written.

    Attributes:
        name: its name.
        dtype: its dtype, as torch names it.
        shape: its shape.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.width

    @property
    def width(self) -> int:
        """Size of an element in bytes."""
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype.itemsize


def split(slots: Iterable[Slot], most: int) -> list[list[Slot]]:
    """Spread tensors over files of at most `most` bytes, in order; a larger one has a file of its own."""
    shards: list[list[Slot]] = []
    room = -1
    for slot in slots:
        if slot.size > room:
            shards.append([])
            room = most
        shards[-1].append(slot)
        room -= slot.size
    return shards


def shard_names(stem: str, count: int) -> list[str]:
    """Names of a component's files, as diffusers and transformers choose them."""
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def index_text(names: Sequence[str], shards: Sequence[Sequence[Slot]]) -> str:
    """Write the index of a component that is spread over several files."""
    placed = {slot.name: name for name, shard in zip(names, shards, strict=True) for slot in shard}
    total = sum(slot.size for shard in shards for slot in shard)
    return json.dumps(
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}, indent=2
    )


def write_shard(
    path: Path,
    slots: Sequence[Slot],
    make: Callable[[str], torch.Tensor],
    on_bytes: Callable[[int], None] = lambda _: None,
) -> str:
    """Write a file; return the SHA-256 of what was written.

    Args:
        path: the file.
        slots: its tensors.
        make: makes a tensor by its name, in any dtype.
        on_bytes: called with the bytes of the tensors so far after each of them.

    Raises:
        OSError: it cannot be written.
        ValueError: a tensor has another shape than was announced, or overflows its dtype.
    """
    ordered = sorted(slots, key=lambda slot: -slot.width)  # readers map tensors, which are to be aligned
    digest, written = hashlib.sha256(), 0
    with PlainFile(path, "w") as file:
        for part in _header(ordered):
            digest.update(part)
            file.write(part)
        for slot in ordered:
            tensor = make(slot.name)
            if tuple(tensor.shape) != slot.shape:
                raise ValueError(f"{slot.name} has shape {list(tensor.shape)}, not {list(slot.shape)}")
            flat = tensor.to(getattr(torch, slot.dtype)).contiguous().view(-1)
            if slot.dtype == "float16" and not flat.isfinite().all() and tensor.isfinite().all():
                raise ValueError(f"{slot.name} overflows {slot.dtype}")
            content = flat.view(torch.uint8).numpy().data
            digest.update(content)
            file.write(content)
            written += slot.size
            on_bytes(written)
    return digest.hexdigest()


def _header(slots: Sequence[Slot]) -> tuple[bytes, bytes]:
    """Make the length of the header, and the header."""
    header: dict[str, Mapping[str, object]] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for slot in slots:
        end = begin + slot.size
        header[slot.name] = {"dtype": _CODES[slot.dtype], "shape": slot.shape, "data_offsets": (begin, end)}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNED)
    return len(text).to_bytes(8, "little"), text
