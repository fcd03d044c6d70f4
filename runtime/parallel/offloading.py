"""Offloading: blocks' weights live in host memory, and come to places on the device where they are visited.

A place holds one block at a time. With two places, each block comes while the one before it runs. With one
for every position, blocks stay until those of another transformer come to the same positions: transformers
take turns on the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from runtime.parallel.host_memory import host_memory

_ALIGNED = 512  # bytes, as CUDA's caching allocator aligns tensors


class Offload:
    """Weights of blocks that live in host memory, and are copied to the device to be visited.

    They are only read there, so nothing is copied back. Copies run on a stream of their own: a copy waits
    until the block in its place has run, a block waits for its weights, and the host for neither.

    Args:
        device: the device.
        places: number of places on the device; None for one for each position.

    Attributes:
        held, peak: bytes of blocks that are on the device now, and at most so far.
        moved: bytes that were copied to the device so far.
    """

    def __init__(self, device: torch.device, places: int | None = None):
        self._device, self._limit = device, places
        self._places: list[Place] = []
        self._blocks: dict[nn.Module, Block] = {}
        self._weights: set[int] = set()
        self.held, self.peak, self.moved = 0, 0, 0
        with torch.accelerator.device_index(device.index):
            self._copying = torch.get_device_module(device).Stream()

    def add(self, block: nn.Module, position: int) -> None:
        """Move a block's weights from the device, or from wherever they are, to host memory.

        Args:
            block: the block.
            position: its position in the order in which the blocks of its transformer run.
        """
        number = position if self._limit is None else position % self._limit
        if number == len(self._places):
            self._places.append(Place(self._event(), self._event()))
        place = self._places[number]
        leaves, size = _layout(block)
        self._count(size)
        taken = self._moved(leaves, size, place)
        self._count(-size)
        place.size = max(place.size, size)
        self._blocks[block] = taken
        self._weights |= {id(weight) for weight in taken.at_home}

    def open(self) -> None:
        """Allocate the places on the device; they last as long as this object. No block is added later."""
        module = torch.get_device_module(self._device)
        for place in self._places:
            if place.memory is None:
                place.memory = self._room(place.size)
                self._count(place.size)
        # The memory may be what earlier work on this stream has just let go of.
        self._copying.wait_stream(module.current_stream(self._device))

    def holds(self, weight: torch.Tensor) -> bool:
        """Return whether a weight is of one of the blocks."""
        return id(weight) in self._weights

    def expect(self, blocks: Sequence[nn.Module]) -> None:
        """Start to copy the first of `blocks` to each place; the blocks are about to be visited."""
        arriving: set[int] = set()
        for block in (self._blocks[one] for one in blocks):
            if id(block.place) not in arriving:
                arriving.add(id(block.place))
                self._fetch(block)

    def visit(self, blocks: Sequence[nn.Module]) -> Iterator[nn.Module]:
        """Yield each of `blocks` when it is on the device. The next visit is likely to be of the same."""
        self.open()
        self.expect(blocks)
        visited = [self._blocks[one] for one in blocks]
        for index, block in enumerate(visited):
            self._fetch(block)
            with self._on_device(block):
                yield blocks[index]
            following = (one for one in visited[index + 1 :] if one.place is block.place)
            self._fetch(next(following, block))
        self.expect(blocks)

    @torch.no_grad()
    def write(self, block: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
        """Replace weights of a block that is not being visited; see `Weights.write`."""
        torch.get_device_module(self._device).synchronize()  # a copy may still be reading
        for name, weight in weights.items():
            block.get_parameter(name).copy_(weight)
        place = self._blocks[block].place
        if place.guest is self._blocks[block]:
            place.guest = None

    def _fetch(self, block: Block) -> None:
        """Start to copy a block to its place, if it is not there; the place's block must have been left."""
        place = block.place
        if place.guest is block:
            return
        assert place.memory is not None
        place.guest = None
        with torch.get_device_module(self._device).stream(self._copying):
            self._copying.wait_event(place.left)
            place.memory.narrow(0, 0, len(block.memory)).copy_(block.memory, non_blocking=True)
            place.arrived.record(self._copying)
        place.guest = block
        self.moved += len(block.memory)

    @contextmanager
    def _on_device(self, block: Block) -> Iterator[None]:
        module, place = torch.get_device_module(self._device), block.place
        module.current_stream(self._device).wait_event(place.arrived)
        block.go()
        try:
            yield
        finally:
            block.come_home()
            place.left.record(module.current_stream(self._device))

    def _moved(self, leaves: list[Leaf], size: int, place: Place) -> Block:
        """Move a block's weights to host memory of the given size."""
        return Block(leaves, host_memory(size, self._device), place)

    def _room(self, size: int) -> torch.Tensor:
        """Allocate memory of the device, which is not used again before all copies to it are done."""
        memory = torch.empty(size, dtype=torch.uint8, device=self._device)
        if self._device.type != "cpu":
            memory.record_stream(self._copying)
        return memory

    def _event(self) -> Any:
        return torch.get_device_module(self._device).Event()

    def _count(self, change: int) -> None:
        self.held += change
        self.peak = max(self.peak, self.held)


class Visitor:
    """A module whose weights live in host memory, and come to the device as a whole while it works there.

    They are only read there, so nothing is copied back. The first `leave` moves them, from wherever they are.

    Args:
        module: the module; its tied weights stay tied.
        device: the device.
    """

    def __init__(self, module: nn.Module, device: torch.device):
        self._module, self._device = module, device
        self._block: Block | None = None

    def come(self) -> None:
        """Copy the weights to the device, unless they are there; in the order of the current stream."""
        if self._block is not None and self._block.place.memory is None:
            place, memory = self._block.place, self._block.memory
            place.memory = torch.empty(len(memory), dtype=torch.uint8, device=self._device)
            place.memory.copy_(memory, non_blocking=True)
            self._block.go()

    def leave(self) -> None:
        """Let the module have its weights in host memory, and let go of those on the device."""
        if self._block is None:
            leaves, size = _layout(self._module)
            self._block = Block(leaves, host_memory(size, self._device), Place(None, None))
        self._block.depart()


@dataclass(slots=True)
class Place:
    """Memory on the device for one block at a time.

    Attributes:
        arrived: event after the last copy to it.
        left: event after the last block that ran in it.
        size: bytes of the largest block that comes to it.
        memory: the memory, once it is allocated.
        guest: the block whose weights are in it, or are on their way.
    """

    arrived: Any
    left: Any
    size: int = 0
    memory: torch.Tensor | None = None
    guest: Block | None = None


@dataclass(frozen=True, slots=True)
class Leaf:
    """A parameter or buffer of a block.

    Attributes:
        table, name: where its module has it.
        start: where it begins in the memory of its block.
        shape, dtype: its shape and dtype.
        is_parameter: whether it is a parameter.
    """

    table: dict[str, Any]
    name: str
    start: int
    shape: torch.Size
    dtype: torch.dtype
    is_parameter: bool

    def within(self, memory: torch.Tensor) -> torch.Tensor:
        """View its part of the memory of its block."""
        length = self.shape.numel() * self.dtype.itemsize
        view = memory.narrow(0, self.start, length).view(self.dtype).view(self.shape)
        return nn.Parameter(view, requires_grad=False) if self.is_parameter else view


class Block:
    """A block whose weights are views into one piece of host memory, and into its place while it is visited.

    Args:
        leaves: its parameters and buffers.
        memory: host memory for them.
        place: its place on the device.
    """

    def __init__(self, leaves: list[Leaf], memory: torch.Tensor, place: Place):
        self.memory, self.place, self._leaves = memory, place, leaves
        self.at_home = [leaf.within(memory) for leaf in leaves]
        with torch.no_grad():
            for weight, leaf in zip(self.at_home, leaves, strict=True):
                weight.copy_(leaf.table[leaf.name])
        self._away: list[torch.Tensor] = []
        self.come_home()

    def go(self) -> None:
        """Let the block use its weights on the device."""
        if not self._away:
            assert self.place.memory is not None
            self._away = [leaf.within(self.place.memory) for leaf in self._leaves]
        self._show(self._away)

    def come_home(self) -> None:
        """Let the block have its weights in host memory."""
        self._show(self.at_home)

    def depart(self) -> None:
        """Come home, and let go of the place's memory."""
        self.come_home()
        self._away, self.place.memory = [], None

    def _show(self, weights: list[torch.Tensor]) -> None:
        for leaf, weight in zip(self._leaves, weights, strict=True):
            leaf.table[leaf.name] = weight


def _layout(block: nn.Module) -> tuple[list[Leaf], int]:
    """Lay a block's parameters and buffers out in one piece of memory; return them and its length.

    One that several modules share has one room.
    """
    leaves, length, rooms = [], 0, dict[int, int]()
    for module in block.modules():
        for table in (module._parameters, module._buffers):
            for name, one in table.items():
                if one is not None:
                    start = rooms.setdefault(id(one), length)
                    if start == length:
                        length += -(-one.numel() * one.element_size() // _ALIGNED) * _ALIGNED
                    is_parameter = isinstance(one, nn.Parameter)
                    leaves.append(Leaf(table, name, start, one.shape, one.dtype, is_parameter))
    return leaves, length
