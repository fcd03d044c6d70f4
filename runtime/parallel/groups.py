"""Process groups: one for each set of ranks that exchange anything, and never more than these."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]

from runtime.parallel.collectives import Guard
from runtime.parallel.meeting import in_background

Backend = Literal["gloo", "nccl"]

_GLOO = timedelta(days=2)  # the watch ends waits on the CPU; what it lets go on is meant to
_NCCL_LEAST, _NCCL_TIMES = 120.0, 4  # seconds, and timeouts: the second line, where a device waits


class ProcessGroups:
    """The process groups of one job, as one of its ranks sees them.

    Every rank asks for the same ones in the same order. Members that have one already get that; a rank that
    is alone gets none.

    Args:
        backend: nccl for tensors on the device and gloo for those on the CPU, or gloo for all.
        device: where this rank's tensors live.
        guard: asked while the ranks of a new group meet.
        timeout: see `runtime.parallel.ranks.join`.
    """

    def __init__(self, backend: Backend, device: torch.device, guard: Guard, timeout: float):
        self._nccl = backend == "nccl"
        self._name = "cpu:gloo,cuda:nccl" if self._nccl else "gloo"
        self._device, self._guard = device, guard
        self._timeout = timedelta(seconds=max(_NCCL_LEAST, _NCCL_TIMES * timeout)) if self._nccl else _GLOO
        self._made: dict[tuple[int, ...], dist.ProcessGroup] = {}

    def open(self, store: Store, rank: int, world: int) -> dist.ProcessGroup:
        """That of all ranks; the first to be asked for."""

        def make() -> dist.ProcessGroup:
            dist.init_process_group(
                self._name,
                store=store,
                rank=rank,
                world_size=world,
                timeout=self._timeout,
                device_id=self._device if self._nccl else None,
            )
            group = dist.group.WORLD
            assert group is not None
            return group

        return self._keep(tuple(range(world)), make)

    def control(self) -> dist.ProcessGroup:
        """Another one of all ranks, for small messages on the CPU beside the tensors."""
        return self._in_background(lambda: dist.new_group(timeout=_GLOO, backend="gloo"))

    def of(self, rows: Sequence[Sequence[int]], rank: int) -> dist.ProcessGroup | None:
        """That of the row that `rank` is in; None if it is alone there.

        Args:
            rows: every rank is in one of them.
        """
        own: dist.ProcessGroup | None = None
        for row in map(tuple, rows):
            if len(row) == 1:
                continue
            if row not in self._made:
                self._keep(row, partial(dist.new_group, list(row), timeout=self._timeout, backend=self._name))
            if rank in row:
                own = self._made[row]
        return own

    def abort(self) -> None:
        """End what devices wait for in vain; for another thread, when the job has failed."""
        if self._nccl:
            for group in reversed(self._made.values()):
                if isinstance(group, dist.ProcessGroup):  # and not the sign that this rank is no member
                    group.abort()

    def _keep(self, members: tuple[int, ...], make: Callable[[], dist.ProcessGroup]) -> dist.ProcessGroup:
        group = self._in_background(make)
        if self._nccl and isinstance(group, dist.ProcessGroup):
            group._get_backend(torch.device("cpu"))._set_default_timeout(_GLOO)
        self._made[members] = group
        return group

    def _in_background(self, make: Callable[[], dist.ProcessGroup]) -> dist.ProcessGroup:
        def on_device() -> dist.ProcessGroup:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)  # threads do not share it
            return make()

        return in_background(on_device, self._guard.check)
