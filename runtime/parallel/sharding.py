"""Where a transformer's blocks are while they do not run: whole on every rank, or shared out over all ranks.

Whoever runs blocks visits them, so that each is whole just while it runs. FSDP2 keeps the shares and collects
them; its hooks are not used, as they would collect a block's weights once for each guidance branch, and, for
blocks that are run one by one, keep them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from runtime.parallel.collectives import Peers


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether a weight is shared out over the ranks."""
    return isinstance(tensor, DTensor)


def own_share(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a weight: all of it, unless it is shared out."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Weights(Protocol):
    """Where the blocks' weights are."""

    def visit(self, blocks: Sequence[nn.Module]) -> Iterator[nn.Module]:
        """Each of `blocks` in turn; until the next one is asked for its weights are whole on the device."""
        ...


class WholeWeights:
    """Every rank keeps every block."""

    def visit(self, blocks: Sequence[nn.Module]) -> Iterator[nn.Module]:
        yield from blocks


class ShardedWeights:
    """Every rank keeps an equal share of each block, and collects the rest while the block before it runs.

    So at most two blocks are whole at a time, and a visit moves each block's weights once.

    Args:
        mesh: all ranks in one row.
        everyone: transfers between them.
    """

    def __init__(self, mesh: DeviceMesh, everyone: Peers):
        self._mesh, self._gather = mesh, _CountedGather(everyone)
        self._shares: dict[nn.Module, FSDPModule] = {}

    def share_out(self, block: nn.Module) -> None:
        """Keep this rank's share of a block that is whole on every rank."""
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


class _Share(nn.Module):
    """What FSDP keeps of one block. Never called: FSDP would hang its hooks, and its class, on the block."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block


class _CountedGather:
    """FSDP's all-gather as one of our transfers: counted, and watched over.

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
