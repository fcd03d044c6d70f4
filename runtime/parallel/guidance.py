"""Classifier-free guidance: how the conditional and the unconditional branch become one.

Tensors may have any shape; guidance acts on each element alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from runtime.parallel.collectives import Peers


class Guidance(Protocol):
    """Joins what this rank's branches gave."""

    def join(self, branches: list[torch.Tensor]) -> torch.Tensor:
        """The guided value, on every rank."""
        ...


class NoGuidance:
    """There is only the conditional branch."""

    def join(self, branches: list[torch.Tensor]) -> torch.Tensor:
        (conditional,) = branches
        return conditional


@dataclass(frozen=True, slots=True)
class LocalGuidance:
    """Both branches are on this rank: u + scale (c − u)."""

    scale: float

    def join(self, branches: list[torch.Tensor]) -> torch.Tensor:
        conditional, unconditional = branches
        return unconditional + self.scale * (conditional - unconditional)


@dataclass(frozen=True, slots=True)
class SplitGuidance:
    """Each of the two ranks of `peers` has one branch, the conditional on its first rank."""

    scale: float
    peers: Peers

    def join(self, branches: list[torch.Tensor]) -> torch.Tensor:
        (own,) = branches
        both = self.peers.gather(own, [tuple(own.shape)] * 2)
        return LocalGuidance(self.scale).join(both)
