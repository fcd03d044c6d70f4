"""xfuser's own sequence parallelism (USP) as an attention backend, on CUDA through the extra `gpu`.

Untested here, for want of a GPU. USP splits evenly only, so what does not divide is refused; Lockstep's own
backends take it.

Tensor legend: B batch, S tokens on this rank, H heads, D channels of a head.

Source: `xfuser.model_executor.layers.usp.USP` (xfuser 0.7), which takes `[B, H, S, D]`.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from runtime.attention import SequenceGroup
from runtime.errors import BadRequestError
from runtime.topology import Topology


class UspAttention:
    """Self-attention through xfuser's process groups and kernels.

    Its groups are global to the process, so a process can use one topology.

    Raises:
        BadRequestError: tokens or heads do not divide, or this process already uses another topology.
    """

    def __init__(self, topology: Topology, group: SequenceGroup):
        uneven = [
            f"{split.total} {what} over {len(split.sizes)} ranks"
            for what, split in (("tokens", group.tokens), ("heads", group.heads))
            if len(set(split.sizes)) > 1
        ]
        if uneven:
            raise BadRequestError(f"attention: xfuser's USP cannot split {' or '.join(uneven)}; use another")
        from xfuser.core import distributed as xfuser
        from xfuser.model_executor.layers.usp import USP

        if not xfuser.model_parallel_is_initialized():
            xfuser.init_distributed_environment(rank=dist.get_rank(), world_size=dist.get_world_size())
            xfuser.initialize_model_parallel(
                classifier_free_guidance_degree=topology.cfg,
                sequence_parallel_degree=topology.sequence,
                ring_degree=topology.ring,
                ulysses_degree=topology.ulysses,
            )
            xfuser.initialize_runtime_state()
        degrees = (xfuser.get_ring_parallel_world_size(), xfuser.get_ulysses_parallel_world_size())
        if degrees != (topology.ring, topology.ulysses):
            raise BadRequestError(
                f"attention: xfuser is set up for ring × ulysses = {degrees[0]} × {degrees[1]} in this "
                f"process, and cannot change to {topology.ring} × {topology.ulysses}"
            )
        self._usp = USP

    def __call__(
        self, query_BSHD: torch.Tensor, key_BSHD: torch.Tensor, value_BSHD: torch.Tensor
    ) -> torch.Tensor:
        query, key, value = (x.transpose(1, 2) for x in (query_BSHD, key_BSHD, value_BSHD))
        output_BHSD: torch.Tensor = self._usp(query, key, value, dropout_p=0.0, is_causal=False)
        return output_BHSD.transpose(1, 2)
