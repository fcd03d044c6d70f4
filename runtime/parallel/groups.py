"""Process groups: one for each set of ranks that exchange data, and no others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]

from runtime.parallel.meeting import in_background
from runtime.parallel.watch import Watch

Backend = Literal["gloo", "nccl"]

_GLOO = timedelta(days=2)  # practically none: the watch ends waits on the CPU
_NCCL_LEAST, _NCCL_TIMES = 120.0, 4  # seconds, and multiples of the timeout: a fallback for device waits


class ProcessGroups:
    """Process groups of one job, as one of its ranks sees them.

    All ranks must request the same groups in the same order. A group is made once for the same members; a
    single rank needs none.

    Args:
        backend: nccl for device tensors and gloo for CPU tensors, or gloo for both.
        device: device of this rank's tensors.
        watch: asked while the ranks of a new group connect to each other.
        timeout: see `runtime.parallel.ranks.join`.
    """

    def __init__(self, backend: Backend, device: torch.device, watch: Watch, timeout: float):
        self._nccl = backend == "nccl"
        self._name = "cpu:gloo,cuda:nccl" if self._nccl else "gloo"
        self._device, self._watch = device, watch
        self._timeout = timedelta(seconds=max(_NCCL_LEAST, _NCCL_TIMES * timeout)) if self._nccl else _GLOO
        self._made: dict[tuple[int, ...], dist.ProcessGroup] = {}

    def open(self, store: Store, rank: int, world: int) -> dist.ProcessGroup:
        """Open the group of all ranks, which is the first."""

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
        """Make another group of all ranks, for small CPU messages beside the tensors."""
        return self._in_background(lambda: dist.new_group(timeout=_GLOO, backend="gloo"))

    def of(self, rows: Sequence[Sequence[int]], rank: int) -> dist.ProcessGroup | None:
        """Group of the row that contains `rank`; None if it is alone there.

        Args:
            rows: disjoint sets of ranks, which together hold every rank.
            rank: this rank.
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
        """Abort the transfers that devices still wait for, from another thread, after the job has failed."""
        if self._nccl:
            for group in reversed(self._made.values()):
                if isinstance(group, dist.ProcessGroup):  # and not the marker of a group without this rank
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

        # NCCL's start takes longer the more ranks there are; gloo's does not.
        with self._watch.connecting(self._timeout.total_seconds() if self._nccl else None):
            try:
                return in_background(on_device, self._watch.check)
            except RuntimeError as error:
                self._watch.blame(error)
