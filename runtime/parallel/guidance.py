"""Classifier-free guidance: joins the conditional and the unconditional branch.

Tensors may have any shape; guidance is element-wise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from runtime.parallel.collectives import Peers


class Guidance(Protocol):
    """Rule that joins the outputs of this rank's branches."""

    @property
    def scale(self) -> float:
        """Guidance scale; 1 without guidance."""
        ...

    def gather(self, branches: list[torch.Tensor]) -> list[torch.Tensor]:
        """Gather the outputs of all branches on every rank, the conditional one first."""
        ...

    def join(self, branches: list[torch.Tensor]) -> torch.Tensor:
        """Compute the guided output on every rank, from this rank's branches."""
        ...


class NoGuidance:
    """No guidance: there is only the conditional branch."""

    scale = 1.0

    def gather(self, branches: list[torch.Tensor]) -> list[torch.Tensor]:
        return branches

    def join(self, branches: list[torch.Tensor]) -> torch.Tensor:
        (conditional,) = branches
        return conditional


@dataclass(frozen=True, slots=True)
class LocalGuidance:
    """Guidance u + scale (c − u), with both branches on this rank."""

    scale: float

    def gather(self, branches: list[torch.Tensor]) -> list[torch.Tensor]:
        return branches

    def join(self, branches: list[torch.Tensor]) -> torch.Tensor:
        conditional, unconditional = branches
        return unconditional + self.scale * (conditional - unconditional)


@dataclass(frozen=True, slots=True)
class SplitGuidance:
    """Guidance with one branch on each of the two ranks of `peers`, the conditional one on the first."""

    scale: float
    peers: Peers

    def gather(self, branches: list[torch.Tensor]) -> list[torch.Tensor]:
        (own,) = branches
        return self.peers.gather(own, [tuple(own.shape)] * 2)

    def join(self, branches: list[torch.Tensor]) -> torch.Tensor:
        return LocalGuidance(self.scale).join(self.gather(branches))
