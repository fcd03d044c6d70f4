"""Attention over a sequence split over ranks: Ulysses all-to-all, ring with log-sum-exp merge, or both.

Ulysses trades a token shard with all heads for all tokens of the Ulysses group with a share of the heads; the
ring then passes keys and values around and merges partial results. Token counts and heads need not divide:
every transfer carries exactly what there is, and nothing is padded.

Tensor legend: B batch, S tokens on this rank, U tokens of its Ulysses group, H heads, h heads on this rank, D
channels of a head.

Source: DeepSpeed-Ulysses (arXiv 2309.14509); Ring Attention (arXiv 2310.01889).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from diffusers.models.transformers.transformer_wan import WanAttention, WanTransformer3DModel

from runtime.sequence import Split
from runtime.wan import Rotary

Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Query, key and value, each `[B, h, tokens, D]` → output of that shape and log-sum-exp `[B, h, tokens]`."""


@dataclass(frozen=True, slots=True)
class SequenceGroup:
    """This rank's place among the ranks that share a sequence.

    Attributes:
        ulysses, ring: process groups of the two axes.
        ulysses_rank, ring_rank: this rank's index in each.
        tokens: the split of the sequence over all its ranks, ring-major.
        heads: the split of the heads over the Ulysses axis.
    """

    ulysses: dist.ProcessGroup
    ring: dist.ProcessGroup
    ulysses_rank: int
    ring_rank: int
    tokens: Split
    heads: Split

    @property
    def ulysses_degree(self) -> int:
        return len(self.heads.sizes)

    @property
    def ulysses_tokens(self) -> tuple[int, ...]:
        """Tokens on each rank of this rank's Ulysses group."""
        first = self.ring_rank * self.ulysses_degree
        return self.tokens.sizes[first : first + self.ulysses_degree]

    @property
    def ring_tokens(self) -> tuple[int, ...]:
        """Tokens that each ring position holds."""
        return self.tokens.merge(self.ulysses_degree).sizes


class SplitSelfAttention:
    """Wan's self-attention for one shard of the tokens: a diffusers attention processor.

    Only the attention itself crosses ranks. Projections, norms and the rotary embedding act on each token
    alone.

    Source: `diffusers.models.transformers.transformer_wan.WanAttnProcessor`.
    """

    def __init__(self, group: SequenceGroup, kernel: Kernel):
        self._group, self._kernel = group, kernel

    @classmethod
    def install(cls, model: WanTransformer3DModel, group: SequenceGroup, kernel: Kernel) -> None:
        """Use it in every block of `model`; cross-attention stays local and as it is."""
        for block in model.blocks:
            block.attn1.set_processor(cls(group, kernel))

    def __call__(
        self,
        attention: WanAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        rotary_emb: Rotary,
    ) -> torch.Tensor:
        query, key, value = (
            projection(hidden_states) for projection in (attention.to_q, attention.to_k, attention.to_v)
        )
        query, key = attention.norm_q(query), attention.norm_k(key)
        query, key, value = (x.unflatten(2, (attention.heads, -1)) for x in (query, key, value))
        output_BSHD = attend(
            rotate(query, rotary_emb), rotate(key, rotary_emb), value, self._group, self._kernel
        )
        projected: torch.Tensor = attention.to_out[0](output_BSHD.flatten(2).type_as(query))
        return projected


def rotate(x_BSHD: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """Turn each pair of channels by its token's angle; the table is `[1, S, 1, D]`, cosines and sines."""
    even, odd = x_BSHD[..., 0::2], x_BSHD[..., 1::2]
    cosines, sines = rotary[0][..., 0::2], rotary[1][..., 1::2]
    turned = torch.empty_like(x_BSHD)
    turned[..., 0::2] = even * cosines - odd * sines
    turned[..., 1::2] = even * sines + odd * cosines
    return turned


def attend(
    query_BSHD: torch.Tensor,
    key_BSHD: torch.Tensor,
    value_BSHD: torch.Tensor,
    group: SequenceGroup,
    kernel: Kernel,
) -> torch.Tensor:
    """Full self-attention over the whole sequence, for this rank's tokens: `[B, S, H, D]`."""
    query, key, value = (
        _heads_from_tokens(x, group).transpose(1, 2) for x in (query_BSHD, key_BSHD, value_BSHD)
    )
    output_BhUD = _ring(query, key, value, group, kernel)
    return _tokens_from_heads(output_BhUD.transpose(1, 2), group)


def _heads_from_tokens(x_BSHD: torch.Tensor, group: SequenceGroup) -> torch.Tensor:
    """All heads of this rank's tokens → this rank's heads of the Ulysses group's tokens, `[B, U, h, D]`."""
    if group.ulysses_degree == 1:
        return x_BSHD
    batch, own, _, channels = x_BSHD.shape
    outgoing = torch.cat([part.reshape(-1) for part in x_BSHD.split_with_sizes(group.heads.sizes, dim=2)])
    heads = group.heads.sizes[group.ulysses_rank]
    shapes = [(batch, tokens, heads, channels) for tokens in group.ulysses_tokens]
    sent = [batch * own * count * channels for count in group.heads.sizes]
    return torch.cat(_exchange(outgoing, sent, shapes, group.ulysses), dim=1)


def _tokens_from_heads(x_BUhD: torch.Tensor, group: SequenceGroup) -> torch.Tensor:
    """The inverse of `_heads_from_tokens`: `[B, S, H, D]`."""
    if group.ulysses_degree == 1:
        return x_BUhD
    batch, _, heads, channels = x_BUhD.shape
    outgoing = torch.cat([part.reshape(-1) for part in x_BUhD.split_with_sizes(group.ulysses_tokens, dim=1)])
    own = group.ulysses_tokens[group.ulysses_rank]
    shapes = [(batch, own, count, channels) for count in group.heads.sizes]
    sent = [batch * tokens * heads * channels for tokens in group.ulysses_tokens]
    return torch.cat(_exchange(outgoing, sent, shapes, group.ulysses), dim=2)


def _exchange(
    outgoing: torch.Tensor, sent: list[int], shapes: Sequence[tuple[int, ...]], group: dist.ProcessGroup
) -> list[torch.Tensor]:
    """All-to-all of unequal pieces: what every rank sent to this one, in rank order and in `shapes`."""
    received = [int(torch.Size(shape).numel()) for shape in shapes]
    incoming = outgoing.new_empty(sum(received))
    dist.all_to_all_single(incoming, outgoing, received, sent, group=group)
    return [
        piece.view(shape) for piece, shape in zip(incoming.split_with_sizes(received), shapes, strict=True)
    ]


def _ring(
    query_BhUD: torch.Tensor,
    key_BhUD: torch.Tensor,
    value_BhUD: torch.Tensor,
    group: SequenceGroup,
    kernel: Kernel,
) -> torch.Tensor:
    """Attention to the keys and values of every ring position, while the next ones are on their way."""
    degree = len(group.ring_tokens)
    if degree == 1:
        return kernel(query_BhUD, key_BhUD, value_BhUD)[0]
    block_2BhUD = torch.stack((key_BhUD, value_BhUD))
    merged: _Partial | None = None
    for distance in range(degree):
        source = (group.ring_rank - distance) % degree
        transfer = None
        if distance + 1 < degree:
            transfer = _Transfer(block_2BhUD, group, tokens=group.ring_tokens[source - 1])
        output, log_sum = kernel(query_BhUD, *block_2BhUD.unbind(0))
        partial = _Partial(output.float(), log_sum.float())
        merged = partial if merged is None else merged.merge(partial)
        if transfer is not None:
            block_2BhUD = transfer.wait()
    assert merged is not None
    return merged.output_BhUD.to(query_BhUD.dtype)


class _Transfer:
    """Passes a block on to the next ring position and takes the previous one's, in the background."""

    def __init__(self, block_2BhUD: torch.Tensor, group: SequenceGroup, tokens: int):
        two, batch, heads, _, channels = block_2BhUD.shape
        self._incoming = block_2BhUD.new_empty(two, batch, heads, tokens, channels)
        degree = len(group.ring_tokens)
        following, previous = (
            dist.get_global_rank(group.ring, (group.ring_rank + step) % degree) for step in (1, -1)
        )
        self._works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, block_2BhUD, following, group.ring),
                dist.P2POp(dist.irecv, self._incoming, previous, group.ring),
            ]
        )

    def wait(self) -> torch.Tensor:
        for work in self._works:
            work.wait()
        return self._incoming


@dataclass(frozen=True, slots=True)
class _Partial:
    """Attention to some of the keys: its output, and the log-sum-exp that says how much it weighs."""

    output_BhUD: torch.Tensor
    log_sum_BhU: torch.Tensor

    def merge(self, other: _Partial) -> _Partial:
        """Attention to the keys of both."""
        log_sum = torch.logaddexp(self.log_sum_BhU, other.log_sum_BhU)
        mine, theirs = (
            partial.output_BhUD * (partial.log_sum_BhU - log_sum).exp().unsqueeze(-1)
            for partial in (self, other)
        )
        return _Partial(mine + theirs, log_sum)


def sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """torch's own fused kernels, through the operators that also return the log-sum-exp."""
    aten = torch.ops.aten
    query, key, value = (x.contiguous() for x in (query, key, value))
    if query.device.type == "cpu":
        output, log_sum = aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)
    elif query.dtype == torch.float32:
        output, log_sum, *_ = aten._scaled_dot_product_efficient_attention(
            query, key, value, None, compute_log_sumexp=True
        )
        log_sum = log_sum[..., : query.shape[2]]  # the kernel rounds its rows up to a multiple of 32
    else:
        output, log_sum, *_ = aten._scaled_dot_product_flash_attention(query, key, value)
    return output, log_sum
