"""Ranks that are not there: what this one would send them is counted, and what they would send is made up."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from runtime.parallel.collectives import Peers, Shape, Traffic, Transfer, Unguarded
from runtime.parallel.ranks import RankGroup, Ranks
from runtime.parallel.topology import Topology


class MadeUpPeers(Peers):
    """As one rank of `size` sees the others. `Peers` counts what is sent; then nothing is sent."""

    def __init__(self, rank: int, size: int):
        super().__init__(None, Unguarded(), Traffic())
        self.rank, self.size = rank, size

    @property
    def traffic(self) -> Traffic:
        """Bytes that this rank would have sent."""
        return self._traffic

    def collects(self, piece: int) -> None:
        """Count a gather to which every rank gives `piece` bytes: see `all_gather_into_tensor`."""
        self._enter(piece * (self.size - 1))

    def _move(
        self, incoming: torch.Tensor, outgoing: torch.Tensor, received: list[int], sent: list[int]
    ) -> None:
        pass

    def _fill(self, tensor: torch.Tensor) -> None:
        pass


class Echo(Peers):
    """For small messages: every rank would have said the same."""

    def __init__(self, rank: int, size: int):
        super().__init__(None, Unguarded(), Traffic())
        self.rank, self.size = rank, size

    def start_joined(self, outgoing: torch.Tensor, sizes: Sequence[int], shapes: Sequence[Shape]) -> Transfer:
        return Transfer(None, outgoing, shapes, self._guard, polls=False)


class MadeUpGroup(RankGroup):
    """The ranks arranged along the axes of a topology, each axis with a traffic of its own."""

    def __init__(self, topology: Topology, rank: int):
        self.topology, self.place = topology, topology.place(rank)
        self._cfg = MadeUpPeers(self.place.cfg, topology.cfg)
        self._ring = MadeUpPeers(self.place.ring, topology.ring)
        self._ulysses = MadeUpPeers(self.place.ulysses, topology.ulysses)
        self._sequence = MadeUpPeers(self.place.sequence, topology.sequence)

    @property
    def axes(self) -> dict[str, MadeUpPeers]:
        """The peers along each axis."""
        found = {axis: getattr(self, f"_{axis}") for axis in ("cfg", "ring", "ulysses", "sequence")}
        return {axis: peers for axis, peers in found.items() if isinstance(peers, MadeUpPeers)}


class MadeUpRanks(Ranks):
    """All ranks of a job that is not run, from one of them.

    Args:
        device: where its tensors would live.
        per_node: GPUs of one machine.
    """

    def __init__(self, device: torch.device, rank: int, size: int, per_node: int):
        control = Echo(rank, size)
        everyone = MadeUpPeers(rank, size)
        node = MadeUpPeers(rank % per_node, min(per_node, size - rank // per_node * per_node))
        super().__init__(
            device, everyone.traffic, everyone=everyone, control=control, node=node, per_node=per_node
        )
        self._made: dict[Topology, MadeUpGroup] = {}
        self.per_node = min(per_node, size)

    def group(self, topology: Topology) -> MadeUpGroup:
        if topology not in self._made:
            self._made[topology] = MadeUpGroup(topology, self.rank)
        return self._made[topology]

    def settle(self) -> None:
        pass

    @property
    def within_blocks(self) -> list[MadeUpPeers]:
        """What transformer blocks may send to, of all groups that were asked for."""
        return [
            peers
            for group in self._made.values()
            for axis, peers in group.axes.items()
            if axis in ("ring", "ulysses")
        ]

    def sent(self, topology: Topology) -> dict[str, int]:
        """Bytes sent so far along each axis."""
        assert isinstance(self.everyone, MadeUpPeers)
        peers = {**self.group(topology).axes, "everyone": self.everyone}
        return {axis: one.traffic.sent for axis, one in peers.items()}
