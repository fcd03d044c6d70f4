"""Blocks of two transformers that take turns on the device: their bytes, bits, and what a failure leaves."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from runtime.parallel.swapping import Swap

CPU = torch.device("cpu")
BLOCK = (8 * 8 + 8) * 4  # bytes


def blocks_of(seed: int, count: int = 3) -> list[nn.Linear]:
    torch.manual_seed(seed)
    return [nn.Linear(8, 8).requires_grad_(False) for _ in range(count)]


def swapped() -> tuple[Swap, list[list[nn.Linear]], list[list[torch.Tensor]]]:
    """Two transformers that take turns, and copies of their weights."""
    both = [blocks_of(seed) for seed in (1, 2)]
    copies = [[weight.clone() for block in blocks for weight in block.parameters()] for blocks in both]
    swap = Swap(CPU)
    for blocks in both:
        for place, block in enumerate(blocks):
            swap.add(block, place)
    return swap, both, copies


def storages(blocks: list[list[nn.Linear]]) -> set[int]:
    return {weight.data_ptr() for one in blocks for block in one for weight in block.parameters()}


def test_one_is_on_the_device_and_a_switch_takes_the_room_of_a_weight() -> None:
    swap, both, _ = swapped()
    assert swap.held == 3 * BLOCK
    assert swap.peak == 4 * BLOCK  # the second is loaded block by block
    swap.peak = 0
    for blocks in (both[1], both[1], both[0]):
        for number, _ in enumerate(swap.visit(blocks)):
            assert swap.held == 3 * BLOCK, number
    assert swap.peak == 3 * BLOCK + 8 * 8 * 4


def test_weights_are_the_same_bits_whoever_is_visited() -> None:
    swap, both, copies = swapped()
    x, seen = torch.randn(2, 8), []
    for number in (0, 1, 0, 1, 1):
        value = x
        for block in swap.visit(both[number]):
            value = block(value)
        seen.append(value)
        for blocks, copied in zip(both, copies, strict=True):
            weights = [weight for block in blocks for weight in block.parameters()]
            assert all(torch.equal(one, other) for one, other in zip(weights, copied, strict=True))
    assert torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3]) and torch.equal(seen[3], seen[4])
    assert not torch.equal(seen[0], seen[1])


def test_what_is_away_lies_in_the_memory_of_what_came() -> None:
    """Host memory is exchanged, not taken anew; weights stay the same objects, which compiled code holds."""
    swap, both, _ = swapped()
    objects = [id(weight) for one in both for block in one for weight in block.parameters()]
    away = storages([both[1]])
    list(swap.visit(both[1]))
    assert storages([both[0]]) == away
    assert objects == [id(weight) for one in both for block in one for weight in block.parameters()]
    assert all(swap.holds(weight) for one in both for block in one for weight in block.parameters())
    assert not swap.holds(nn.Parameter(torch.zeros(8)))


def test_a_visit_that_ends_early_leaves_each_block_whole() -> None:
    swap, both, copies = swapped()
    next(swap.visit(both[1]))  # the first block of the second, and the others of the first
    assert swap.held == 3 * BLOCK
    for number in (0, 1):
        visited = [weight for block in swap.visit(both[number]) for weight in block.parameters()]
        assert all(torch.equal(one, other) for one, other in zip(visited, copies[number], strict=True))


def test_memory_that_runs_out_in_the_middle_of_a_switch_spoils_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    swap, both, copies = swapped()
    make, calls = torch.empty_like, []

    def short(*given: object, **named: object) -> torch.Tensor:
        calls.append(given)
        if len(calls) == 4:
            raise torch.OutOfMemoryError("out of memory")
        return make(*given, **named)  # type: ignore[call-overload, no-any-return]

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty_like", short)
        with pytest.raises(torch.OutOfMemoryError):
            list(swap.visit(both[1]))
    assert swap.held == 3 * BLOCK
    for number in (1, 0):
        visited = [weight for block in swap.visit(both[number]) for weight in block.parameters()]
        assert all(torch.equal(one, other) for one, other in zip(visited, copies[number], strict=True))


def test_blocks_of_other_shapes_cannot_change_places() -> None:
    swap = Swap(CPU)
    swap.add(nn.Linear(8, 8), 0)
    with pytest.raises(ValueError, match="transformers whose blocks differ cannot change places"):
        swap.add(nn.Linear(8, 4), 0)
