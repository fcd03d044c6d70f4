"""Sharding of a transformer's blocks: while not running, they are whole on every rank, or sharded over all.

Blocks are visited in order to run them, so that each is whole just while it runs. FSDP2 keeps the shards and
gathers them. Its hooks are not used, as they would gather a block's weights once for each guidance branch,
and, for blocks that run one by one, keep them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from runtime.parallel.collectives import Peers


def own_share(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a weight, or all of it if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_of(tensor: torch.Tensor, everyone: Peers) -> torch.Tensor:
    """All of a weight, gathered from all ranks if it is sharded; collective then."""
    if not isinstance(tensor, DTensor):
        return tensor
    own, (length, *rest) = tensor.to_local(), tensor.shape
    rows = -(-length // everyone.size)  # FSDP2 splits as `torch.chunk` does: the last shards may be empty
    piece = own.new_zeros(rows, *rest)
    piece[: len(own)] = own
    whole = own.new_empty(everyone.size * rows, *rest)
    everyone.all_gather_into_tensor(whole, piece).wait()
    return whole[:length]


class Weights(Protocol):
    """Storage of the blocks' weights."""

    def visit(self, blocks: Sequence[nn.Module]) -> Iterator[nn.Module]:
        """Yield each of `blocks`, whose weights are whole on the device until the next one is requested."""
        ...

    def expect(self, blocks: Sequence[nn.Module]) -> None:
        """Begin to bring weights of `blocks` to the device, if they are elsewhere: they are visited next."""
        ...

    def write(self, block: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
        """Replace weights of a block that is not being visited; every rank calls it.

        Args:
            block: the block.
            weights: name within the block → the whole new weight, on any device.
        """
        ...


class WholeWeights:
    """Weights of which every rank keeps every block."""

    def visit(self, blocks: Sequence[nn.Module]) -> Iterator[nn.Module]:
        yield from blocks

    def expect(self, blocks: Sequence[nn.Module]) -> None:
        pass

    @torch.no_grad()
    def write(self, block: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
        for name, weight in weights.items():
            block.get_parameter(name).copy_(weight)


class ShardedWeights:
    """Weights of which every rank keeps an equal shard of each block.

    The rest is gathered while the block before runs, so at most two blocks are whole at a time, and a visit
    moves each block's weights once.

    Args:
        mesh: all ranks, in one dimension.
        everyone: transfers between them.
    """

    def __init__(self, mesh: DeviceMesh, everyone: Peers):
        self._mesh, self._gather = mesh, _CountedGather(everyone)
        self._shares: dict[nn.Module, FSDPModule] = {}

    def shard(self, block: nn.Module) -> None:
        """Shard a block that is whole on every rank, and keep this rank's shard."""
        share = fully_shard(_Share(block), mesh=self._mesh, reshard_after_forward=True)
        share.set_custom_all_gather(self._gather)  # type: ignore[arg-type]
        self._shares[block] = share

    def visit(self, blocks: Sequence[nn.Module]) -> Iterator[nn.Module]:
        shares = [self._shares[block] for block in blocks]
        coming = shares[0].unshard(async_op=True) if shares else None
        for block, share, following in zip_longest(blocks, shares, shares[1:]):
            assert coming is not None
            coming.wait()
            coming = None if following is None else following.unshard(async_op=True)
            try:
                yield block
            finally:
                share.reshard()

    def expect(self, blocks: Sequence[nn.Module]) -> None:
        pass

    @torch.no_grad()
    def write(self, block: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
        size, rank = self._mesh.size(), self._mesh.get_local_rank()
        for name, weight in weights.items():
            own = own_share(block.get_parameter(name))
            if own.numel():  # shards are along the first axis, and the last ones may be empty
                own.copy_(weight.chunk(size)[rank])


class _Share(nn.Module):
    """Module that FSDP wraps instead of the block, to which it would add hooks. Never called."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block


class _CountedGather:
    """FSDP's all-gather as one of our transfers, counted and watched.

    Source: the interface `torch.distributed.fsdp._fully_shard._fsdp_api.AllGather`.
    """

    def __init__(self, everyone: Peers):
        self._everyone = everyone

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work | None:
        work = self._everyone.all_gather_into_tensor(output_tensor, input_tensor)
        if async_op:
            return work
        work.wait()
        return None
