"""Fake ranks: bytes that this rank would send are counted, and received tensors are fake."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from runtime.parallel.collectives import Peers, Shape, Traffic, Transfer, Unguarded
from runtime.parallel.ranks import RankGroup, Ranks
from runtime.parallel.topology import Topology


class FakePeers(Peers):
    """Peers that do not exist, as one rank of `size` sees them. `Peers` counts bytes; nothing is sent."""

    def __init__(self, rank: int, size: int, traffic: Traffic | None = None):
        super().__init__(None, Unguarded(), traffic or Traffic())
        self.rank, self.size = rank, size

    @property
    def traffic(self) -> Traffic:
        """Bytes that this rank would have sent."""
        return self._traffic

    def count(self, sent: int) -> None:
        """Count bytes that this rank would send."""
        self._enter(sent)

    def count_all_gather(self, piece: int) -> None:
        """Count an all-gather to which every rank contributes `piece` bytes."""
        self.count(piece * (self.size - 1))

    def _move(
        self, incoming: torch.Tensor, outgoing: torch.Tensor, received: list[int], sent: list[int]
    ) -> None:
        pass

    def _fill(self, tensor: torch.Tensor, source: int) -> None:
        pass


class Echo(Peers):
    """Peers for small messages: each of them answers with this rank's own message."""

    def __init__(self, rank: int, size: int):
        super().__init__(None, Unguarded(), Traffic())
        self.rank, self.size = rank, size

    def start_joined(self, outgoing: torch.Tensor, sizes: Sequence[int], shapes: Sequence[Shape]) -> Transfer:
        return Transfer(None, outgoing, shapes, self._guard, polls=False)


class FakeGroup(RankGroup):
    """Fake ranks along the axes of a topology; traffic is counted for each axis."""

    def __init__(self, topology: Topology, rank: int):
        self.topology, self.place = topology, topology.place(rank)
        self._cfg = FakePeers(self.place.cfg, topology.cfg)
        self._ring = FakePeers(self.place.ring, topology.ring)
        self._ulysses = FakePeers(self.place.ulysses, topology.ulysses)
        self._sequence = FakePeers(self.place.sequence, topology.sequence)

    @property
    def axes(self) -> dict[str, FakePeers]:
        """Peers along each axis."""
        found = {axis: getattr(self, f"_{axis}") for axis in ("cfg", "ring", "ulysses", "sequence")}
        return {axis: peers for axis, peers in found.items() if isinstance(peers, FakePeers)}


class FakeRanks(Ranks):
    """All ranks of a rehearsed job, as one of them sees them.

    Args:
        device: device of the rank.
        rank, size: number of the rank, and of all ranks.
        per_node: GPUs of one machine.
    """

    def __init__(self, device: torch.device, rank: int, size: int, per_node: int):
        control = Echo(rank, size)
        everyone = FakePeers(rank, size)
        node = FakePeers(rank % per_node, min(per_node, size - rank // per_node * per_node))
        super().__init__(
            device, everyone.traffic, everyone=everyone, control=control, node=node, per_node=per_node
        )
        self._made: dict[Topology, FakeGroup] = {}
        self.per_node = min(per_node, size)

    def group(self, topology: Topology) -> FakeGroup:
        if topology not in self._made:
            self._made[topology] = FakeGroup(topology, self.rank)
        return self._made[topology]

    def leading(self, count: int) -> Peers | None:
        if count >= self.size:
            return self.everyone
        return FakePeers(self.rank, count, self.traffic) if self.rank < count else None

    def synchronize(self) -> None:
        pass

    @property
    def within_blocks(self) -> list[FakePeers]:
        """Peers to which transformer blocks may send, in all groups that were made."""
        return [
            peers
            for group in self._made.values()
            for axis, peers in group.axes.items()
            if axis in ("ring", "ulysses")
        ]

    def sent(self, topology: Topology) -> dict[str, int]:
        """Bytes that this rank has sent so far along each axis of a topology."""
        assert isinstance(self.everyone, FakePeers)
        peers = {**self.group(topology).axes, "everyone": self.everyone}
        return {axis: one.traffic.sent for axis, one in peers.items()}
