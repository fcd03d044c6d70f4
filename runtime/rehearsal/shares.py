"""A transformer whose blocks are shared out over all ranks, as made-up tensors.

FSDP2 needs a device for its streams, so what it does is modelled: each rank holds an equal share of every
parameter, rounded up along its first axis; one gather for each block, into one buffer, out of which the whole
parameters are copied while the next block's gather runs. Bytes are those of `runtime.sharding` on real ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest

import torch
from torch import nn

from runtime.rehearsal.ledger import Ledger
from runtime.rehearsal.made_up import DEVICE
from runtime.rehearsal.peers import MadeUpPeers


class MadeUpShares:
    """This rank's shares of the blocks; whole blocks are there only while they are visited.

    Args:
        everyone: all ranks.
        ledger: of what is held.
    """

    def __init__(self, everyone: MadeUpPeers, ledger: Ledger):
        self._everyone, self._ledger = everyone, ledger
        self._shares: dict[nn.Module, list[torch.Tensor]] = {}

    def share_out(self, block: nn.Module) -> None:
        """Keep this rank's share of a block that is whole; to be called where tensors are made up."""
        size, parameters = self._everyone.size, list(block.parameters())
        with self._ledger.of_weights():
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

    def _gather(self, block: nn.Module) -> torch.Tensor:
        """The buffer in which all ranks' shares arrive."""
        piece = sum(share.numel() * share.element_size() for share in self._shares[block])
        self._everyone.collects(piece)
        with self._ledger.of_weights():
            return torch.empty(piece * self._everyone.size, dtype=torch.uint8, device=DEVICE)

    def _make_whole(self, block: nn.Module) -> None:
        with self._ledger.of_weights():
            _replace(block, lambda one: torch.empty(one.shape, dtype=one.dtype, device=DEVICE))

    def _let_go(self, block: nn.Module) -> None:
        _replace(block, lambda one: torch.empty(one.shape, dtype=one.dtype, device="meta"))


def _replace(block: nn.Module, make: object) -> None:
    """Exchange each parameter for what `make` makes of it."""
    assert callable(make)
    for module in block.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[leaf] = nn.Parameter(make(parameter), requires_grad=False)
