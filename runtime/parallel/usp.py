"""xfuser's own sequence parallelism (USP) as an attention backend, on CUDA through the extra `gpu`.

xfuser would create about ten process groups of its own, for a pipeline that does not exist here. USP only
looks them up in its modules, so Lockstep puts its own groups there, at each call the ones of the call's
topology. USP splits evenly only, so sizes that do not divide are refused; Lockstep's own backends take them.
Its transfers are neither counted nor watched.

Tensor legend: B batch, S tokens on this rank, H heads, D channels of a head.

Source: `xfuser.model_executor.layers.usp.USP` (xfuser 0.7), which takes `[B, H, S, D]`.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from runtime.errors import BadRequestError
from runtime.parallel.attention import SequenceGroup
from runtime.parallel.kernels import GOOD_CUDNN, card_of, why_not

log = logging.getLogger(__name__)

_BY_SPEED = ("FLASH_3", "CUDNN", "SDPA_FLASH")  # all return their log-sum-exp, which a ring needs


@functools.cache
def choose_backend(device: torch.device, dtype: torch.dtype) -> str:
    """Choose the fastest of xfuser's kernels that runs on this machine, by running each once.

    Raises:
        BadRequestError: none of them runs.
    """
    reasons, card = {}, card_of(device)
    for name in _BY_SPEED:
        old = name == "CUDNN" and card is not None and card.cudnn < GOOD_CUDNN
        reason = "its cuDNN is too old" if old else why_not(f"xfuser:{name}", device, dtype, ring=2)
        if reason is None:
            log.info("xfuser's USP uses %s", name)
            return name
        reasons[name] = reason
    told = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise BadRequestError(f"attention: 'xfuser' given; none of its kernels runs on this machine: {told}")


@dataclass(frozen=True)
class UspAttention:
    """Self-attention through xfuser's USP; compares equal to another of the same split and kernel.

    Args:
        group: split of tokens and heads.
        backend: name of xfuser's kernel.

    Raises:
        BadRequestError: tokens or heads do not divide evenly.
    """

    group: SequenceGroup
    backend: str
    _own: dict[str, Any] = field(init=False, compare=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        group = self.group
        uneven = [
            f"{split.total} {what} over {len(split.sizes)} ranks"
            for what, split in (("tokens", group.tokens), ("heads", group.heads))
            if len(set(split.sizes)) > 1
        ]
        if uneven:
            raise BadRequestError(f"attention: xfuser's USP cannot split {' or '.join(uneven)}; use another")
        from xfuser.core.distributed.attention_backend import AttentionBackendType

        self._own["sequence"] = SimpleNamespace(
            world_size=len(group.tokens.sizes),
            rank_in_group=group.ring.rank * group.ulysses.size + group.ulysses.rank,
            ulysses_world_size=group.ulysses.size,
            ulysses_rank=group.ulysses.rank,
            ring_world_size=group.ring.size,
            ring_rank=group.ring.rank,
        )
        self._own["runtime"] = SimpleNamespace(
            attention_backend=AttentionBackendType[self.backend],
            fp8_comms=None,
            runtime_config=SimpleNamespace(use_spargeattn_head_balance=False),
        )

    def __call__(
        self,
        query_BSHD: torch.Tensor,
        key_BSHD: torch.Tensor,
        value_BSHD: torch.Tensor,
        replicated: int = 0,
        /,
    ) -> torch.Tensor:
        if replicated:
            raise ValueError(f"xfuser's USP splits all tokens, got {replicated} that every rank has")
        from xfuser.core.distributed import parallel_state, runtime_state
        from xfuser.model_executor.layers import usp

        usp.PROCESS_GROUP.ULYSSES_PG, usp.PROCESS_GROUP.RING_PG = (
            self.group.ulysses.group,
            self.group.ring.group,
        )
        parallel_state._SP, runtime_state._RUNTIME = self._own["sequence"], self._own["runtime"]
        query, key, value = (x.transpose(1, 2) for x in (query_BSHD, key_BSHD, value_BSHD))
        output_BHSD: torch.Tensor = usp.USP(query, key, value, dropout_p=0.0, is_causal=False)
        return output_BHSD.transpose(1, 2)
