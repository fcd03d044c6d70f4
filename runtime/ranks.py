"""The rank group as one rank sees it: its process groups, and this rank's share of a generation."""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from runtime.attention import SequenceGroup
from runtime.guidance import Guidance, LocalGuidance, SplitGuidance
from runtime.sequence import Sequence, Split, SplitSequence
from runtime.topology import Topology

_Branch = TypeVar("_Branch")


class RankGroup:
    """Process groups for every axis of `topology`.

    Every rank of the default process group makes one, at the same point of its program.

    Args:
        topology: its world is the default process group's.
        device_type: `cpu` or `cuda`.

    Raises:
        ValueError: the default process group has another size.
    """

    def __init__(self, topology: Topology, device_type: str):
        if dist.get_world_size() != topology.world:
            raise ValueError(f"{topology} needs {topology.world} ranks, there are {dist.get_world_size()}")
        self.topology = topology
        self.place = topology.place(dist.get_rank())
        self._mesh = init_device_mesh(
            device_type,
            (topology.cfg, topology.ring, topology.ulysses),
            mesh_dim_names=("cfg", "ring", "ulysses"),
        )
        self._sequence = self._mesh["ring", "ulysses"]._flatten("sequence").get_group()

    def sequence(self, tokens: int) -> Sequence:
        """How `tokens` tokens are split over this rank's branch."""
        return SplitSequence(self._split(tokens), self.place.sequence, self._sequence)

    def attention(self, tokens: int, heads: int) -> SequenceGroup:
        """How attention over `tokens` tokens and `heads` heads is split."""
        return SequenceGroup(
            ulysses=self._mesh.get_group("ulysses"),
            ring=self._mesh.get_group("ring"),
            ulysses_rank=self.place.ulysses,
            ring_rank=self.place.ring,
            tokens=self._split(tokens),
            heads=Split.even(heads, self.topology.ulysses),
        )

    def branches(self, both: tuple[_Branch, _Branch]) -> tuple[_Branch, ...]:
        """Those of the two guidance branches that this rank computes."""
        return both if self.topology.cfg == 1 else (both[self.place.cfg],)

    def guidance(self, scale: float) -> Guidance:
        """What joins the branches."""
        if self.topology.cfg == 1:
            return LocalGuidance(scale)
        return SplitGuidance(scale, self._mesh.get_group("cfg"))

    def _split(self, tokens: int) -> Split:
        return Split.even(tokens, self.topology.sequence)
