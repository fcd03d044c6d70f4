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
        """Split into parts that differ by at most one, the longer ones first.

        Raises:
            ValueError: a part would be empty.
        """
        if parts < 1 or total < parts:
            raise ValueError(f"{total} cannot be split into {parts} parts that are not empty")
        whole, rest = divmod(total, parts)
        return cls(tuple(whole + (index < rest) for index in range(parts)))

    @property
    def total(self) -> int:
        return sum(self.sizes)

    def slice(self, part: int) -> slice:
        """Slice of part `part`."""
        end = list(accumulate(self.sizes))[part]
        return slice(end - self.sizes[part], end)

    def merge(self, group: int) -> Split:
        """Merge each `group` consecutive parts into one."""
        return Split(tuple(sum(self.sizes[i : i + group]) for i in range(0, len(self.sizes), group)))


class TokenSequence(Protocol):
    """A sequence of tokens as this rank holds it."""

    def shard(self, whole_BLD: torch.Tensor) -> torch.Tensor:
        """Take this rank's tokens `[B, S, D]` from a tensor that every rank has whole."""
        ...

    def gather(self, part_BSD: torch.Tensor) -> torch.Tensor:
        """Gather all tokens `[B, L, D]` from every rank's."""
        ...


class WholeSequence:
    """A sequence that one rank holds as a whole."""

    def shard(self, whole_BLD: torch.Tensor) -> torch.Tensor:
        return whole_BLD

    def gather(self, part_BSD: torch.Tensor) -> torch.Tensor:
        return part_BSD


class SplitSequence:
    """A sequence of which the ranks of `peers` hold consecutive parts, in rank order.

    Args:
        split: sizes of the parts.
        peers: ranks that share the sequence.
    """

    def __init__(self, split: Split, peers: Peers):
        self._split, self._peers = split, peers

    def shard(self, whole_BLD: torch.Tensor) -> torch.Tensor:
        return whole_BLD[:, self._split.slice(self._peers.rank)]

    def gather(self, part_BSD: torch.Tensor) -> torch.Tensor:
        batch, _, *rest = part_BSD.shape
        parts = self._peers.gather(part_BSD, [(batch, size, *rest) for size in self._split.sizes])
        return torch.cat(parts, dim=1)
