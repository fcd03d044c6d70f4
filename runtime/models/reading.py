"""Reading of a component's weights by all ranks of a node at once, each weight by one of them."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

import torch

from runtime.models.layouts.stored import TensorReader
from runtime.models.layouts.weights import Weight

_AHEAD = 2**30  # bytes that a rank has read and not handed over
_THREADS = 4  # of a rank: reading waits for the disk, and casting for memory


def readers(sizes: Mapping[str, int], ranks: int) -> dict[str, int]:
    """Distribute weights over ranks: neighbours to different ones, and about as many bytes to each.

    Args:
        sizes: name of each weight → its bytes, in the order in which they are used.
        ranks: number of the ranks.

    Returns:
        The name of each weight → the rank that reads it.
    """
    read, found = [0] * ranks, {}
    for name, size in sizes.items():
        found[name] = min(range(ranks), key=read.__getitem__)
        read[found[name]] += size
    return found


class ReadAhead:
    """Reads weights in threads before they are taken, as far as a bound on memory allows.

    Args:
        weights: name → how the weight is made, and the dtype that it is converted to; in the order in which
            they will be taken.
        mapped: leave weights that need no conversion in the mapped file, as diffusers does. On a CPU the bits
            of a matrix product depend on the alignment of its operands in memory, which differs there.
    """

    def __init__(self, weights: Mapping[str, tuple[Weight, torch.dtype]], *, mapped: bool = False):
        self._left, self._mapped = deque(weights.items()), mapped
        self._begun = deque[tuple[str, int, Future[torch.Tensor]]]()
        self._bytes, self._reader = 0, TensorReader()
        self._threads = ThreadPoolExecutor(_THREADS, "weights")

    def __enter__(self) -> Self:
        self._begin()
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._reader.__exit__()

    def take(self, name: str) -> torch.Tensor:
        """Take the next weight, once it was read.

        Args:
            name: its name.

        Raises:
            OSError, ValueError: a file is damaged, or has changed.
        """
        next_name, size, future = self._begun.popleft()
        assert next_name == name, f"{next_name} is next, not {name}"
        weight = future.result()
        self._bytes -= size
        self._begin()
        return weight

    def _begin(self) -> None:
        while self._left and (self._bytes < _AHEAD or not self._begun):
            name, (weight, dtype) = self._left.popleft()
            size = weight_bytes(weight.shape, dtype)
            self._begun.append((name, size, self._threads.submit(self._read, weight, dtype)))
            self._bytes += size

    def _read(self, weight: Weight, dtype: torch.dtype) -> torch.Tensor:
        return weight.make(self._reader).to(dtype, copy=not self._mapped)


def weight_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes of a weight."""
    return math.prod(shape) * dtype.itemsize
