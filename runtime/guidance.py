"""Classifier-free guidance: how the conditional and the unconditional branch become one.

Tensors may have any shape; guidance acts on each element alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist


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
    """Each of the two ranks of `group` has one branch, the conditional on its first rank."""

    scale: float
    group: dist.ProcessGroup

    def join(self, branches: list[torch.Tensor]) -> torch.Tensor:
        (own,) = branches
        both = [torch.empty_like(own) for _ in range(2)]
        dist.all_gather(both, own.contiguous(), group=self.group)
        return LocalGuidance(self.scale).join(both)
