"""Fake shards of a transformer's blocks.

FSDP2 needs a device for its streams, so it is modelled: each rank holds an equal share of every parameter,
rounded up along its first axis. Each block is gathered into one buffer, out of which the whole parameters are
copied while the next block is gathered. Bytes equal those of `runtime.parallel.sharding` on real ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import nn

from runtime.rehearsal.ledger import Ledger
from runtime.rehearsal.peers import FakePeers


class FakeShards:
    """Fake weights of blocks that are sharded over all ranks; a block is whole only while it is visited.

    A block has fake tensors of its whole weights all the time; they are counted only while it is visited.

    Args:
        everyone: all ranks.
        ledger: ledger of the memory that they hold.
    """

    def __init__(self, everyone: FakePeers, ledger: Ledger):
        self._everyone, self._ledger = everyone, ledger
        self._sharded: dict[nn.Module, _Sharded] = {}

    def shard(self, block: nn.Module) -> None:
        """Keep only this rank's share of a whole block; call it within `FakeDevice.running`."""
        size = self._everyone.size
        shares, whole = [], 0
        for one in block.parameters():
            rows, *rest = one.shape
            shares.append(-(-rows // size) * math.prod(rest) * one.element_size())
            whole += self._ledger.set_aside(one)
        self._ledger.weigh(shares)
        self._sharded[block] = _Sharded(sum(shares), whole)

    def visit(self, blocks: Sequence[nn.Module]) -> Iterator[nn.Module]:
        ledger, arriving = self._ledger, self._gather(blocks[0])  # until parameters are copied out of it
        whole = 0
        try:
            for block, following in zip_longest(blocks, blocks[1:]):
                whole = ledger.weigh([self._sharded[block].whole])
                ledger.unweigh(arriving)
                arriving = 0 if following is None else self._gather(following)
                yield block
                ledger.unweigh(whole)
                whole = 0
        finally:  # of blocks that are not visited any more, too
            ledger.unweigh(whole + arriving)

    def expect(self, blocks: Sequence[nn.Module]) -> None:
        pass

    def write(self, block: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
        raise NotImplementedError("a rehearsal has no weights to write")

    def _gather(self, block: nn.Module) -> int:
        """Start to gather a block; return the bytes of the buffer for all ranks' shares."""
        share = self._sharded[block].share
        self._everyone.count_all_gather(share)
        return self._ledger.weigh([share * self._everyone.size])


@dataclass(frozen=True, slots=True)
class _Sharded:
    """Bytes of this rank's share of a block, and those that the whole block holds."""

    share: int
    whole: int
