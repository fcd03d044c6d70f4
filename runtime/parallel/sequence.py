"""Splitting a sequence over ranks, unevenly and exactly.

Tensor legend: B batch, L tokens of the whole sequence, S tokens on this rank, D channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch

from runtime.parallel.collectives import Peers


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
    """The ranks of `peers` hold consecutive parts, in rank order.

    Args:
        split: the parts' sizes.
        peers: the ranks that share the sequence.
    """

    def __init__(self, split: Split, peers: Peers):
        self._split, self._peers = split, peers

    def shard(self, whole_BLD: torch.Tensor) -> torch.Tensor:
        return whole_BLD[:, self._split.slice(self._peers.rank)]

    def gather(self, part_BSD: torch.Tensor) -> torch.Tensor:
        batch, _, *rest = part_BSD.shape
        parts = self._peers.gather(part_BSD, [(batch, size, *rest) for size in self._split.sizes])
        return torch.cat(parts, dim=1)
