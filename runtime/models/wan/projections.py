"""Fused projections: query, key and value of Wan's attention come from one matrix product."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from diffusers.models.transformers.transformer_wan import WanAttention
from torch import nn


def fuse_projections(block: nn.Module) -> None:
    """Join the projections of every attention in a block that have the same input.

    Those of text and image tokens join to key and value. The separate layers are given up, so no weight is
    held twice.

    Source: `WanAttention.fuse_projections` in diffusers, which keeps them.
    """
    for module in list(block.modules()):
        if isinstance(module, WanAttention) and not module.fused_projections:
            _fuse(module)


def project(attention: WanAttention, hidden_BSD: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Query, key and value of self-attention `[B, S, D]` each, by fused or separate projections."""
    if attention.fused_projections:
        return attention.to_qkv(hidden_BSD).chunk(3, dim=-1)  # type: ignore[no-any-return]
    return attention.to_q(hidden_BSD), attention.to_k(hidden_BSD), attention.to_v(hidden_BSD)


def projections(attention: WanAttention, hidden_BSD: torch.Tensor) -> tuple[Callable[[], torch.Tensor], ...]:
    """What computes query, key and value, as `project` does, each when it is called."""
    if attention.fused_projections:
        made = project(attention, hidden_BSD)
        return tuple(lambda one=one: one for one in made)
    return tuple(partial(layer, hidden_BSD) for layer in (attention.to_q, attention.to_k, attention.to_v))


def _fuse(attention: WanAttention) -> None:
    if attention.is_cross_attention:
        attention.to_kv = _joined(attention.to_k, attention.to_v)
    else:
        attention.to_qkv = _joined(attention.to_q, attention.to_k, attention.to_v)
        del attention.to_q
    del attention.to_k, attention.to_v
    if attention.add_k_proj is not None:
        attention.to_added_kv = _joined(attention.add_k_proj, attention.add_v_proj)
        attention.add_k_proj = attention.add_v_proj = nn.Identity()  # tells the processor that there are any
    attention.fused_projections = True


def _joined(*layers: nn.Linear) -> nn.Linear:
    """One layer with the outputs of all, one after another."""
    with torch.device("meta"):
        joined = nn.Linear(layers[0].in_features, sum(one.out_features for one in layers))
    joined.weight = nn.Parameter(torch.cat([one.weight.detach() for one in layers]), requires_grad=False)
    joined.bias = nn.Parameter(torch.cat([one.bias.detach() for one in layers]), requires_grad=False)
    return joined
