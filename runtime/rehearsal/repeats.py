"""Repeated parts (blocks, and tiles of frames) are run once or twice, and counted as often as they occur.

This changes no count: the tests run everything, and compare.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from runtime.parallel.sharding import Weights, WholeWeights
from runtime.rehearsal.ledger import Ledger, Work
from runtime.rehearsal.peers import FakeRanks

_RUN = 2  # blocks of each class: memory before the first may differ from memory before later ones


class RepeatedBlocks:
    """Weights that visit only the first blocks of each class, and count the others as the last of these.

    Args:
        weights: weights of the blocks.
        ledger: ledger of their work.
        ranks: ranks to which blocks send.
    """

    def __init__(self, weights: Weights, ledger: Ledger, ranks: FakeRanks):
        self._weights, self._ledger, self._ranks = weights, ledger, ranks

    def visit(self, blocks: Sequence[nn.Module]) -> Iterator[nn.Module]:
        seen: dict[type[nn.Module], int] = defaultdict(int)
        took: dict[type[nn.Module], tuple[Work, list[int]]] = {}
        for block in self._weights.visit(blocks):
            kind, peers = type(block), self._ranks.within_blocks
            seen[kind] += 1
            if seen[kind] > _RUN:
                work, sent = took[kind]
                self._ledger.add(work)
                for one, count in zip(peers, sent, strict=True):
                    one.count(count)
                continue
            done, before = self._ledger.work.copy(), [one.traffic.sent for one in peers]
            yield block
            sent = [one.traffic.sent - count for one, count in zip(peers, before, strict=True)]
            took[kind] = self._ledger.work.minus(done), sent

    def expect(self, blocks: Sequence[nn.Module]) -> None:
        self._weights.expect(blocks)

    def write(self, block: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
        self._weights.write(block, weights)


class RepeatedLayers(nn.ModuleList):
    """An encoder's layers, of which only the first are run when they are iterated over; see `RepeatedBlocks`.

    Args:
        layers: layers that turn hidden states into ones of the same shape.
        ledger: ledger of their work.
        ranks: ranks of the encoder's group.
    """

    def __init__(self, layers: nn.ModuleList, ledger: Ledger, ranks: FakeRanks):
        super().__init__(layers)
        self._repeated = RepeatedBlocks(WholeWeights(), ledger, ranks)

    def __iter__(self) -> Iterator[nn.Module]:
        return self._repeated.visit(list(super().__iter__()))


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Result of coding one area of some frames: its work, and the state that it left."""

    work: Work
    rise: int
    sent: Counter[str]
    output: torch.Size
    cache: list[Any]
    index: int


class RepeatedChunks(nn.Module):
    """A VAE's encoder or decoder that codes areas of the same size and the same position in time only once.

    Source: the signatures of `WanEncoder3d` and `WanDecoder3d` in
    `diffusers.models.autoencoders.autoencoder_kl_wan`.

    Args:
        coder: the encoder or decoder.
        ledger: ledger of its work.
        ranks: ranks to which it may send.
    """

    def __init__(self, coder: nn.Module, ledger: Ledger, ranks: FakeRanks):
        super().__init__()
        self._coder, self._ledger, self._ranks = coder, ledger, ranks
        self._known: dict[Any, _Chunk] = {}

    def forward(
        self, x: torch.Tensor, feat_cache: list[Any], feat_idx: list[int], **options: bool
    ) -> torch.Tensor:
        key = x.shape, tuple(options.items()), tuple(_size(one) for one in feat_cache)
        if key in self._known:
            return self._again(self._known[key], x, feat_cache, feat_idx)
        done, before = self._ledger.work.copy(), self._ranks.traffic.axes.copy()
        with self._ledger.rise() as rise:
            output: torch.Tensor = self._coder(x, feat_cache=feat_cache, feat_idx=feat_idx, **options)
        sent = self._ranks.traffic.axes - before
        left = [_size(one) for one in feat_cache]
        work = self._ledger.work.minus(done)
        self._known[key] = _Chunk(work, rise[0], sent, output.shape, left, feat_idx[0])
        return output

    def _again(
        self, known: _Chunk, x: torch.Tensor, feat_cache: list[Any], feat_idx: list[int]
    ) -> torch.Tensor:
        self._ledger.add(known.work, known.rise)
        self._ranks.traffic.axes.update(known.sent)
        for place, one in enumerate(known.cache):  # one by one, so that old and new ones are not all held
            feat_cache[place] = x.new_empty(one) if isinstance(one, torch.Size) else one
        feat_idx[0] = known.index
        return x.new_empty(known.output)


def _size(one: Any) -> Any:
    """Replace a tensor in a cache by its shape; return anything else as it is."""
    return one.shape if isinstance(one, torch.Tensor) else one
