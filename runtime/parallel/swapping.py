"""Swapping of experts: the blocks of one transformer are on the device, those of the others in host memory.

A block that is visited changes places with the one that is on the device at its position, weight by weight. A
switch thus takes no more of the device than the largest weight, and nothing of the host. It takes place while
the first computed step of an expert runs; nothing moves at the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn


class Swap:
    """Weights of the blocks of several transformers of one shape, of which one is on the device.

    Both directions of a copy are queued on the device's stream, so their order is that of the program; host
    memory is pinned for a GPU.

    Args:
        device: the device.

    Attributes:
        held, peak: bytes of blocks that are on the device now, and at most so far.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._places: dict[nn.Module, int] = {}
        self._present: list[list[nn.Parameter]] = []  # place → weights on the device
        self._weights: set[int] = set()
        self.held, self.peak = 0, 0

    def add(self, block: nn.Module, place: int) -> None:
        """Take in a block that is on the device.

        The first one at a place stays there, later ones are moved to host memory.

        Args:
            block: the block.
            place: its position among the blocks of its transformer.

        Raises:
            ValueError: its weights have other shapes than those of the first.
        """
        weights = list(block.parameters())
        self._places[block] = place
        self._weights |= {id(weight) for weight in weights}
        self._count(sum(map(_bytes, weights)))
        if place == len(self._present):
            self._present.append(weights)
            return
        if list(map(_shape, weights)) != list(map(_shape, self._present[place])):
            raise ValueError("transformers whose blocks differ cannot change places")
        for weight in weights:
            weight.data = self._to_host(weight.data)
        self._count(-sum(map(_bytes, weights)))

    def holds(self, weight: torch.Tensor) -> bool:
        """Return whether a weight is of one of the blocks."""
        return id(weight) in self._weights

    def visit(self, blocks: Sequence[nn.Module]) -> Iterator[nn.Module]:
        """Yield each of `blocks` when it is on the device."""
        for block in blocks:
            self._bring(block)
            yield block

    @torch.no_grad()
    def write(self, block: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
        """Replace weights of a block, wherever they are; see `Weights.write`."""
        for name, weight in weights.items():
            block.get_parameter(name).copy_(weight)

    def _bring(self, block: nn.Module) -> None:
        present = self._present[self._places[block]]
        for number, incoming in enumerate(block.parameters()):
            outgoing = present[number]
            if outgoing is not incoming:
                self._exchange(outgoing, incoming)
                present[number] = incoming

    @torch.no_grad()
    def _exchange(self, outgoing: nn.Parameter, incoming: nn.Parameter) -> None:
        """Move `incoming` to the device, and `outgoing` to where it was."""
        host = incoming.data
        arrived = torch.empty_like(outgoing.data)
        self._count(_bytes(arrived))
        incoming.data = arrived.copy_(host, non_blocking=True)
        outgoing.data = host.copy_(outgoing.data, non_blocking=True)
        self._count(-_bytes(arrived))

    def _to_host(self, weight: torch.Tensor) -> torch.Tensor:
        pinned = self._device.type == "cuda"
        return torch.empty_like(weight, device="cpu", pin_memory=pinned).copy_(weight)

    def _count(self, change: int) -> None:
        self.held += change
        self.peak = max(self.peak, self.held)


def _bytes(weight: torch.Tensor) -> int:
    return weight.numel() * weight.element_size()


def _shape(weight: torch.Tensor) -> tuple[torch.Size, torch.dtype]:
    return weight.shape, weight.dtype
