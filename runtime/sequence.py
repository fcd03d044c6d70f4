"""Splitting a sequence over ranks, unevenly and exactly.

Tensor legend: B batch, L tokens of the whole sequence, S tokens on this rank, D channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch
import torch.distributed as dist


@dataclass(frozen=True, slots=True)
class Split:
    """Contiguous parts of a length, in order; sizes may differ.

    Attributes:
        sizes: length of each part.
    """

    sizes: tuple[int, ...]

    @classmethod
    def even(cls, total: int, parts: int) -> Split:
        """Parts that differ by at most one, the longer ones first.

        Raises:
            ValueError: there would be a part with nothing in it.
        """
        if parts < 1 or total < parts:
            raise ValueError(f"{total} cannot be split into {parts} parts with something in each")
        whole, rest = divmod(total, parts)
        return cls(tuple(whole + (index < rest) for index in range(parts)))

    @property
    def total(self) -> int:
        return sum(self.sizes)

    def slice(self, part: int) -> slice:
        """Where part `part` lies."""
        end = list(accumulate(self.sizes))[part]
        return slice(end - self.sizes[part], end)

    def merge(self, group: int) -> Split:
        """The split whose parts are `group` consecutive parts of this one."""
        return Split(tuple(sum(self.sizes[i : i + group]) for i in range(0, len(self.sizes), group)))


class Sequence(Protocol):
    """How this rank holds a sequence of tokens."""

    def shard(self, whole_BLD: torch.Tensor) -> torch.Tensor:
        """This rank's tokens `[B, S, D]` of a tensor that every rank has whole."""
        ...

    def gather(self, part_BSD: torch.Tensor) -> torch.Tensor:
        """All tokens `[B, L, D]` from every rank's own."""
        ...


class WholeSequence:
    """One rank holds everything."""

    def shard(self, whole_BLD: torch.Tensor) -> torch.Tensor:
        return whole_BLD

    def gather(self, part_BSD: torch.Tensor) -> torch.Tensor:
        return part_BSD


class SplitSequence:
    """The ranks of `group` hold consecutive parts.

    Args:
        split: the parts' sizes.
        part: which of them this rank holds, its rank in `group`.
    """

    def __init__(self, split: Split, part: int, group: dist.ProcessGroup):
        self._split, self._part, self._group = split, part, group

    def shard(self, whole_BLD: torch.Tensor) -> torch.Tensor:
        return whole_BLD[:, self._split.slice(self._part)]

    def gather(self, part_BSD: torch.Tensor) -> torch.Tensor:
        """Parts are padded to one length for the transfer only and cut again: uneven parts arrive exactly."""
        longest = max(self._split.sizes)
        batch, own, *rest = part_BSD.shape
        padded = part_BSD.new_zeros(batch, longest, *rest)
        padded[:, :own] = part_BSD
        parts = [torch.empty_like(padded) for _ in self._split.sizes]
        dist.all_gather(parts, padded, group=self._group)
        return torch.cat([p[:, :size] for p, size in zip(parts, self._split.sizes, strict=True)], dim=1)
