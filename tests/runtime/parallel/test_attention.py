"""Attention over split sequences equals attention over the whole one, on real processes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from runtime.parallel.attention import attend
from runtime.parallel.kernels import find_kernel
from runtime.parallel.ranks import Ranks
from runtime.parallel.topology import Topology
from tests.ranks import WarmRanks

CHANNELS = 16


def tensors(batch: int, tokens: int, heads: int, dtype: torch.dtype) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(batch, tokens, heads, CHANNELS, generator=g).to(dtype) for _ in range(3)]


def whole(batch: int, tokens: int, heads: int, dtype: torch.dtype) -> torch.Tensor:
    query, key, value = (x.transpose(1, 2) for x in tensors(batch, tokens, heads, dtype))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)


def attend_on_rank(
    ranks: Ranks, topology: Topology, cases: list[tuple[int, int, int]], dtype: str, kernel: str
) -> list[torch.Tensor]:
    group, outputs = ranks.group(topology), []
    for batch, tokens, heads in cases:
        sequence = group.sequence(tokens)
        parts = [sequence.shard(x) for x in tensors(batch, tokens, heads, getattr(torch, dtype))]
        place = group.attention(tokens, heads)
        outputs.append(sequence.gather(attend(*parts, group=place, kernel=find_kernel(kernel))))
    return outputs


CASES = [(1, 24, 4), (2, 24, 4), (1, 23, 4), (2, 7, 5)]  # tokens and heads that divide, and that do not


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    "topology",
    [
        Topology(),
        Topology(ulysses=2),
        Topology(ring=2),
        Topology(ulysses=3),
        Topology(ring=3),
        Topology(ring=2, ulysses=2),
    ],
    ids=lambda t: f"ring{t.ring}-ulysses{t.ulysses}",
)
def test_split_attention_is_whole_attention(topology: Topology, warm: WarmRanks) -> None:
    for outputs in warm.run(topology.world, attend_on_rank, topology, CASES, "float32", "flash"):
        for output, case in zip(outputs, CASES, strict=True):
            expected = whole(*case, torch.float32)
            assert (output - expected).norm() / expected.norm() < 1e-5


@pytest.mark.timeout(240)
def test_bfloat16_is_no_worse_than_one_rank(warm: WarmRanks) -> None:
    topology = Topology(ring=2, ulysses=2)
    outputs = warm.run(4, attend_on_rank, topology, CASES, "bfloat16", "flash")[0]
    for output, case in zip(outputs, CASES, strict=True):
        truth = whole(*case, torch.float32)
        own_error = (whole(*case, torch.bfloat16).float() - truth).norm()
        assert (output.float() - truth).norm() <= 1.5 * own_error


def attend_jointly(
    ranks: Ranks, topology: Topology, replicated: int, cases: list[tuple[int, int, int]], dtype: str
) -> list[torch.Tensor]:
    """What all tokens see where the first `replicated` ones are on every rank."""
    group, outputs = ranks.group(topology), []
    for batch, tokens, heads in cases:
        sequence = group.sequence(tokens - replicated)
        parts = [
            torch.cat((x[:, :replicated], sequence.shard(x[:, replicated:])), dim=1)
            for x in tensors(batch, tokens, heads, getattr(torch, dtype))
        ]
        place = group.attention(tokens - replicated, heads)
        output = attend(*parts, replicated, group=place, kernel=find_kernel("flash"))
        rest = sequence.gather(output[:, replicated:].contiguous())
        outputs.append(torch.cat((output[:, :replicated], rest), dim=1))
    return outputs


JOINT = [(1, 24, 4), (2, 23, 4), (1, 13, 5)]


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    "topology",
    [
        Topology(),
        Topology(ulysses=2),
        Topology(ring=2),
        Topology(ring=2, ulysses=2),
        Topology(ulysses=4),
        Topology(ring=4),
    ],
    ids=lambda t: f"ring{t.ring}-ulysses{t.ulysses}",
)
def test_tokens_that_every_rank_has_stand_before_those_that_are_split(
    topology: Topology, warm: WarmRanks
) -> None:
    for outputs in warm.run(topology.world, attend_jointly, topology, 7, JOINT, "float32"):
        for output, case in zip(outputs, JOINT, strict=True):
            expected = whole(*case, torch.float32)
            assert (output - expected).norm() / expected.norm() < 1e-5
            assert (output[:, :7] - expected[:, :7]).norm() / expected[:, :7].norm() < 1e-5


@pytest.mark.timeout(240)
def test_joint_attention_in_bfloat16_is_no_worse_than_on_one_rank(warm: WarmRanks) -> None:
    outputs = warm.run(4, attend_jointly, Topology(ring=2, ulysses=2), 7, JOINT, "bfloat16")[0]
    for output, case in zip(outputs, JOINT, strict=True):
        truth = whole(*case, torch.float32)
        own_error = (whole(*case, torch.bfloat16).float() - truth).norm()
        assert (output.float() - truth).norm() <= 1.5 * own_error
