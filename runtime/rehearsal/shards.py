"""Fake shards of a transformer's blocks.

FSDP2 needs a device for its streams, so it is modelled: each rank holds an equal share of every parameter,
rounded up along its first axis. Each block is gathered into one buffer, out of which the whole parameters are
copied while the next block is gathered. Bytes equal those of `runtime.parallel.sharding` on real ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest

import torch
from torch import nn

from runtime.rehearsal.fake import DEVICE
from runtime.rehearsal.ledger import Ledger
from runtime.rehearsal.peers import FakePeers


class FakeShards:
    """Fake weights of blocks that are sharded over all ranks; a block is whole only while it is visited.

    Args:
        everyone: all ranks.
        ledger: ledger of the memory that they hold.
    """

    def __init__(self, everyone: FakePeers, ledger: Ledger):
        self._everyone, self._ledger = everyone, ledger
        self._shares: dict[nn.Module, list[torch.Tensor]] = {}

    def shard(self, block: nn.Module) -> None:
        """Keep only this rank's share of a whole block; call it within `FakeDevice.running`."""
        size, parameters = self._everyone.size, list(block.parameters())
        with self._ledger.as_weights():
            self._shares[block] = [
                torch.empty((-(-one.shape[0] // size), *one.shape[1:]), dtype=one.dtype, device=DEVICE)
                for one in parameters
            ]
        self._let_go(block)

    def visit(self, blocks: Sequence[nn.Module]) -> Iterator[nn.Module]:
        arriving = [self._gather(blocks[0])]  # held until the parameters are copied out of it
        for block, following in zip_longest(blocks, blocks[1:]):
            self._make_whole(block)
            arriving.clear()
            if following is not None:
                arriving.append(self._gather(following))
            try:
                yield block
            finally:
                self._let_go(block)

    def expect(self, blocks: Sequence[nn.Module]) -> None:
        pass

    def write(self, block: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
        raise NotImplementedError("a rehearsal has no weights to write")

    def _gather(self, block: nn.Module) -> torch.Tensor:
        """Start to gather a block; return the buffer for all ranks' shares."""
        piece = sum(share.numel() * share.element_size() for share in self._shares[block])
        self._everyone.count_all_gather(piece)
        with self._ledger.as_weights():
            return torch.empty(piece * self._everyone.size, dtype=torch.uint8, device=DEVICE)

    def _make_whole(self, block: nn.Module) -> None:
        with self._ledger.as_weights():
            _replace(block, lambda one: torch.empty(one.shape, dtype=one.dtype, device=DEVICE))

    def _let_go(self, block: nn.Module) -> None:
        _replace(block, lambda one: torch.empty(one.shape, dtype=one.dtype, device="meta"))


def _replace(block: nn.Module, make: object) -> None:
    """Replace each parameter by `make` of it."""
    assert callable(make)
    for module in block.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[leaf] = nn.Parameter(make(parameter), requires_grad=False)
