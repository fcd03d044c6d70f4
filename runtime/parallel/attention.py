"""Attention over a sequence split over ranks: Ulysses all-to-all, ring with log-sum-exp merge, or both.

Ulysses trades a token shard with all heads for all tokens of the Ulysses group with a share of the heads; the
ring then passes keys and values around and merges partial results. Token counts and heads need not divide
evenly: pieces may differ in size, and nothing is padded.

Some tokens may be on every rank, as the text of a joint text-image transformer: [replicated ‖ split]. All
tokens attend to all. Keys and values of replicated tokens are never sent; what these see is computed head by
head in the Ulysses group, and sent to the others of it.

Tensor legend: B batch, R replicated tokens, S tokens on this rank (those before them included where there are
any), U tokens of its Ulysses group, H heads, h heads on this rank, D channels of a head.

Source: DeepSpeed-Ulysses (arXiv 2309.14509); Ring Attention (arXiv 2310.01889).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from runtime.parallel.collectives import Peers, Transfer
from runtime.parallel.kernels import Kernel
from runtime.parallel.sequence import Split

_Make = Callable[[], torch.Tensor]


@dataclass(frozen=True, slots=True)
class SequenceGroup:
    """Ranks that share a sequence, and how it is split over them.

    Attributes:
        ulysses, ring: ranks along the two axes.
        tokens: split of the sequence over all its ranks, ring-major.
        heads: split of the heads over the Ulysses axis.
    """

    ulysses: Peers
    ring: Peers
    tokens: Split
    heads: Split

    @property
    def ulysses_tokens(self) -> tuple[int, ...]:
        """Tokens on each rank of this rank's Ulysses group."""
        first = self.ring.rank * self.ulysses.size
        return self.tokens.sizes[first : first + self.ulysses.size]

    @property
    def ring_tokens(self) -> tuple[int, ...]:
        """Tokens that each ring position holds."""
        return self.tokens.merge(self.ulysses.size).sizes


class Attend(Protocol):
    """Attention of this rank's tokens to the whole sequence."""

    def __call__(
        self,
        query_BSHD: torch.Tensor,
        key_BSHD: torch.Tensor,
        value_BSHD: torch.Tensor,
        replicated: int = 0,
        /,
    ) -> torch.Tensor:
        """Query, key and value of this rank's tokens `[B, S, H, D]` → what they see in the whole sequence.

        Args:
            replicated: so many of the tokens, the first, are the same on every rank.
        """
        ...


@dataclass(frozen=True, slots=True)
class SplitAttention:
    """Self-attention over a split sequence; compares equal to another of the same split and kernel."""

    group: SequenceGroup
    kernel: Kernel

    def __call__(
        self,
        query_BSHD: torch.Tensor,
        key_BSHD: torch.Tensor,
        value_BSHD: torch.Tensor,
        replicated: int = 0,
        /,
    ) -> torch.Tensor:
        return attend(query_BSHD, key_BSHD, value_BSHD, replicated, group=self.group, kernel=self.kernel)

    def overlapped(self, query: _Make, key: _Make, value: _Make) -> torch.Tensor:
        """Attend as `__call__` does, to `[B, S, H, D]` tensors that are computed here, in three exchanges.

        Values are sent while the keys are computed, and keys while the queries are.
        """
        arriving = [_start_heads([make()], self.group) for make in (value, key, query)]
        value_BhUD, key_BhUD, query_BhUD = (wait()[0] for wait in arriving)
        output_BhUD = _ring(query_BhUD, key_BhUD, value_BhUD, self.group, self.kernel)
        return _tokens_from_heads(output_BhUD, self.group)


@dataclass(frozen=True, slots=True)
class LocalAttention:
    """Self-attention over a sequence that is whole on this rank; compiled blocks include it."""

    kernel: Kernel

    def __call__(
        self,
        query_BSHD: torch.Tensor,
        key_BSHD: torch.Tensor,
        value_BSHD: torch.Tensor,
        replicated: int = 0,
        /,
    ) -> torch.Tensor:
        inputs_BHSD = (x_BSHD.transpose(1, 2) for x_BSHD in (query_BSHD, key_BSHD, value_BSHD))
        return self.kernel(*inputs_BHSD)[0].transpose(1, 2)


def attend(
    query_BSHD: torch.Tensor,
    key_BSHD: torch.Tensor,
    value_BSHD: torch.Tensor,
    replicated: int = 0,
    /,
    *,
    group: SequenceGroup,
    kernel: Kernel,
) -> torch.Tensor:
    """Compute full self-attention over the whole sequence for this rank's tokens, `[B, S, H, D]`.

    Args:
        replicated: so many of the tokens, the first, are the same on every rank, and `group.tokens` splits
            the others. What they see is the same on all ranks up to rounding.
    """
    inputs = query_BSHD, key_BSHD, value_BSHD
    shared_BhRD = _own_heads([x[:, :replicated] for x in inputs], group)
    query, key, value = _heads_from_tokens([x[:, replicated:] for x in inputs], group)
    if replicated:
        query = torch.cat((shared_BhRD[0], query), dim=2)
    output = _ring(query, key, value, group, kernel, shared_BhRD[1:] if replicated else ())
    own = _tokens_from_heads(output[:, :, replicated:], group)
    if not replicated:
        return own
    return torch.cat((_all_heads(output[:, :, :replicated], group), own), dim=1)


def _own_heads(inputs_BRHD: Sequence[torch.Tensor], group: SequenceGroup) -> list[torch.Tensor]:
    """This rank's heads of tokens that every rank has, `[B, h, R, D]` each."""
    own = group.heads.slice(group.ulysses.rank)
    return [x_BRHD[:, :, own].transpose(1, 2) for x_BRHD in inputs_BRHD]


def _all_heads(output_BhRD: torch.Tensor, group: SequenceGroup) -> torch.Tensor:
    """The inverse of `_own_heads`: `[B, R, H, D]` from every rank's own heads."""
    output_BRhD = output_BhRD.transpose(1, 2)
    if group.ulysses.size == 1:
        return output_BRhD
    batch, tokens, _, channels = output_BRhD.shape
    shapes = [(batch, tokens, heads, channels) for heads in group.heads.sizes]
    return torch.cat(group.ulysses.gather(output_BRhD.contiguous(), shapes), dim=2)


def _heads_from_tokens(inputs_BSHD: Sequence[torch.Tensor], group: SequenceGroup) -> list[torch.Tensor]:
    """Exchange all heads of this rank's tokens for its heads of the group's tokens, `[B, h, U, D]` each."""
    return _start_heads(inputs_BSHD, group)()


def _start_heads(
    inputs_BSHD: Sequence[torch.Tensor], group: SequenceGroup
) -> Callable[[], list[torch.Tensor]]:
    """Start what `_heads_from_tokens` does; what is returned waits for it.

    Outgoing pieces are written into one send buffer, token-major, so that the received ones form the sequence
    of the Ulysses group without another copy.
    """
    if group.ulysses.size == 1:
        return lambda: [x_BSHD.transpose(1, 2) for x_BSHD in inputs_BSHD]
    batch, own, _, channels = inputs_BSHD[0].shape
    count, heads = len(inputs_BSHD), group.heads.sizes[group.ulysses.rank]
    outgoing = inputs_BSHD[0].new_empty(count * inputs_BSHD[0].numel())
    sizes = [own * count * batch * there * channels for there in group.heads.sizes]
    for number, part in enumerate(outgoing.split_with_sizes(sizes)):
        part_SnBhD = part.view(own, count, batch, -1, channels)
        for which, x_BSHD in enumerate(inputs_BSHD):
            part_SnBhD[:, which].copy_(x_BSHD[:, :, group.heads.slice(number)].transpose(0, 1))
    shapes = [(tokens, count, batch, heads, channels) for tokens in group.ulysses_tokens]
    transfer = group.ulysses.start_joined(outgoing, sizes, shapes)

    def wait() -> list[torch.Tensor]:
        arrived = transfer.wait_joined().view(-1, count, batch, heads, channels)
        return [x.permute(1, 2, 0, 3) for x in arrived.unbind(1)]

    return wait


def _tokens_from_heads(output_BhUD: torch.Tensor, group: SequenceGroup) -> torch.Tensor:
    """Invert `_heads_from_tokens`, to `[B, S, H, D]`."""
    if group.ulysses.size == 1:
        return output_BhUD.transpose(1, 2)
    batch, heads, _, channels = output_BhUD.shape
    own = group.ulysses_tokens[group.ulysses.rank]
    outgoing = output_BhUD.permute(2, 0, 1, 3).reshape(-1)
    sizes = [tokens * batch * heads * channels for tokens in group.ulysses_tokens]
    shapes = [(own, batch, there, channels) for there in group.heads.sizes]
    pieces_SBhD = group.ulysses.start_joined(outgoing, sizes, shapes).wait()
    return torch.cat(pieces_SBhD, dim=2).transpose(0, 1)


def _ring(
    query_BhUD: torch.Tensor,
    key_BhUD: torch.Tensor,
    value_BhUD: torch.Tensor,
    group: SequenceGroup,
    kernel: Kernel,
    shared_BhRD: Sequence[torch.Tensor] = (),
) -> torch.Tensor:
    """Compute attention to each ring position's keys and values, while the next ones are in transfer.

    Args:
        shared_BhRD: keys and values that every position has, if there are any: they count once.
    """
    ring = group.ring
    if ring.size == 1:
        return kernel(query_BhUD, *_joined(shared_BhRD, (key_BhUD, value_BhUD)))[0]
    block_2BhUD = torch.stack((key_BhUD, value_BhUD))
    merged: _Partial | None = None
    for distance in range(ring.size):
        previous = (ring.rank - distance - 1) % ring.size  # whose block comes next
        passing = None
        if distance + 1 < ring.size:
            passing = _pass_on(block_2BhUD, ring, tokens=group.ring_tokens[previous])
        output, log_sum = kernel(
            query_BhUD, *_joined(shared_BhRD if distance == 0 else (), block_2BhUD.unbind(0))
        )
        assert log_sum is not None
        partial = _Partial(output.float(), log_sum.float())
        merged = partial if merged is None else merged.merge(partial)
        if passing is not None:
            block_2BhUD = passing.wait()[(ring.rank - 1) % ring.size]
    assert merged is not None
    return merged.output_BhUD.to(query_BhUD.dtype)


def _joined(shared_BhRD: Sequence[torch.Tensor], own_BhUD: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """Keys and values of both."""
    if not shared_BhRD:
        return own_BhUD
    return [torch.cat(both, dim=2) for both in zip(shared_BhRD, own_BhUD, strict=True)]


def _pass_on(block_2BhUD: torch.Tensor, ring: Peers, tokens: int) -> Transfer:
    """Send a block to the next ring position, and receive the previous one's, of `tokens` tokens."""
    following, previous = (ring.rank + 1) % ring.size, (ring.rank - 1) % ring.size
    nothing = block_2BhUD.new_empty(0)
    two, batch, heads, _, channels = block_2BhUD.shape
    pieces = [block_2BhUD if rank == following else nothing for rank in range(ring.size)]
    shapes = [
        (two, batch, heads, tokens, channels) if rank == previous else (0,) for rank in range(ring.size)
    ]
    return ring.start(pieces, shapes)


@dataclass(frozen=True, slots=True)
class _Partial:
    """Attention to some of the keys: the output, and the log-sum-exp that gives its weight."""

    output_BhUD: torch.Tensor
    log_sum_BhU: torch.Tensor

    def merge(self, other: _Partial) -> _Partial:
        """Combine to attention to the keys of both."""
        log_sum = torch.logaddexp(self.log_sum_BhU, other.log_sum_BhU)
        mine, theirs = (
            partial.output_BhUD * (partial.log_sum_BhU - log_sum).exp().unsqueeze(-1)
            for partial in (self, other)
        )
        return _Partial(mine + theirs, log_sum)
