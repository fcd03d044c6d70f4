"""The ranks of one job as one of them sees them: how they meet, their process groups, and its own share."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, NoReturn, Self, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous as meet

from runtime.attention import SequenceGroup
from runtime.collectives import Peers, Traffic, Unguarded
from runtime.errors import BadRequestError, CancelledError, LockstepError, RankFailedError
from runtime.guidance import Guidance, LocalGuidance, NoGuidance, SplitGuidance
from runtime.sequence import Sequence, Split, SplitSequence, WholeSequence
from runtime.topology import Topology
from runtime.watch import Watch, host_name

Backend = Literal["gloo", "nccl"]

_GLANCE = 0.0005  # seconds between two looks at the accelerator's queue

_Branch = TypeVar("_Branch")
_ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """Where ranks meet.

    Attributes:
        rank, world: which of how many.
        local_rank: its number on its node.
        address: a URL that `torch.distributed.rendezvous` understands.
    """

    rank: int
    world: int
    local_rank: int
    address: str

    @classmethod
    def from_environment(cls) -> Self:
        """As torchrun sets it.

        Raises:
            BadRequestError: a variable is missing: this process was not started by torchrun.
        """
        missing = [name for name in _ENVIRONMENT if name not in os.environ]
        if missing:
            raise BadRequestError(f"{', '.join(missing)}: missing; start this with torchrun")
        rank, world, local = (int(os.environ[name]) for name in _ENVIRONMENT[:3])
        return cls(rank, world, local, "env://")

    @classmethod
    def at(cls, address: str, port: int, *, rank: int, world: int, local_rank: int | None = None) -> Self:
        """At a port that rank 0 opens on `address`."""
        url = f"tcp://{address}:{port}?rank={rank}&world_size={world}"
        return cls(rank, world, rank if local_rank is None else local_rank, url)


class Ranks:
    """All ranks of one job, from one of them.

    Attributes:
        rank, size: this rank, and how many there are.
        everyone: transfers between all of them, of tensors on the device.
        control: the same for small messages on the CPU.
        node: transfers within this rank's machine.
        traffic: bytes that this rank has sent, but for `control`.
        watch: sees when another rank fails; None for a rank that is alone.
    """

    def __init__(
        self,
        device: torch.device,
        traffic: Traffic,
        *,
        everyone: Peers,
        control: Peers,
        node: Peers,
        watch: Watch | None = None,
    ):
        self.device, self.traffic = device, traffic
        self.everyone, self.control, self.node = everyone, control, node
        self.watch = watch
        self.rank, self.size = control.rank, control.size
        self._groups: dict[Topology, RankGroup] = {}

    @classmethod
    def alone(cls, device: torch.device) -> Self:
        """One rank, which needs no process group."""
        peers = Peers.alone()
        return cls(device, Traffic(), everyone=peers, control=peers, node=peers)

    @property
    def leads(self) -> bool:
        """Whether this is the rank that encodes text, writes files and speaks to the user."""
        return self.rank == 0

    def group(self, topology: Topology) -> RankGroup:
        """The ranks arranged as `topology`; every rank asks for the same ones in the same order.

        Raises:
            ValueError: the topology is of another size.
        """
        if topology.world != self.size:
            raise ValueError(f"{topology} needs {topology.world} ranks, there are {self.size}")
        if topology not in self._groups:
            self._groups[topology] = RankGroup(topology, self)
        return self._groups[topology]

    @property
    def where(self) -> str:
        """What this rank is doing."""
        return "start" if self.watch is None else self.watch.where

    def at(self, where: str, *, busy: bool = False) -> None:
        """Say what this rank is doing, for errors that name it, and whether others may wait long for it."""
        if self.watch is not None:
            self.watch.at(where, busy=busy)

    def before_transfer(self, confirm: Callable[[], None]) -> None:
        """Call `confirm` before every transfer of tensors from now on; it raises if there must be none."""
        if self.watch is not None:
            self.watch.before_transfer = confirm

    def settle(self) -> None:
        """Wait for the accelerator's queue, but not for a rank that will not come."""
        if self.device.type == "cpu":
            return
        if self.watch is None:
            torch.accelerator.synchronize(self.device)
            return
        event, started = torch.Event(self.device), time.monotonic()
        event.record()
        while not event.query():
            self.watch.check(time.monotonic() - started)
            time.sleep(_GLANCE)

    def agree(self, content: dict[str, Any]) -> None:
        """Make sure that all ranks are about to do the same.

        Args:
            content: JSON that must be equal on every rank.

        Raises:
            RankFailedError: it is not; the message names the rank and the first field that differs.
        """
        told = self.control.tell(content)
        odd = minority([repr(flatten(one)) for one in told])
        if odd is not None:
            usual = flatten(next(one for rank, one in enumerate(told) if rank not in odd))
            own = flatten(told[odd[0]])
            field = next(f for f in sorted({*usual, *own}) if usual.get(f) != own.get(f))
            reason = f"it has {field} = {own.get(field)!r} where other ranks have {usual.get(field)!r}"
            raise RankFailedError(odd[0], self.where, reason)

    def hand_out(self, own: list[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
        """The first rank's tensors, all of `dtype`, on every rank's device.

        Args:
            own: on the first rank; on the others empty.
        """
        shapes = self.control.tell([list(tensor.shape) for tensor in own])[0]
        tensors = own or [torch.empty(shape, dtype=dtype, device=self.device) for shape in shapes]
        for tensor in tensors:
            self.everyone.broadcast(tensor)
        return tensors

    def mesh(self) -> DeviceMesh:
        """All ranks in one row, for sharding weights."""
        return init_device_mesh(self.device.type, (self.size,))


class RankGroup:
    """All ranks arranged along the axes of a topology.

    Args:
        topology: of `ranks.size` ranks.
        ranks: all of them.
    """

    def __init__(self, topology: Topology, ranks: Ranks):
        self.topology = topology
        self.place = topology.place(ranks.rank)
        if ranks.size == 1:
            self._cfg = self._ring = self._ulysses = self._sequence = ranks.everyone
            return
        mesh = init_device_mesh(
            ranks.device.type,
            (topology.cfg, topology.ring, topology.ulysses),
            mesh_dim_names=("cfg", "ring", "ulysses"),
        )
        guard = ranks.watch or Unguarded()
        self._cfg, self._ring, self._ulysses = (
            Peers(mesh.get_group(axis), guard, ranks.traffic) for axis in ("cfg", "ring", "ulysses")
        )
        sequence = mesh["ring", "ulysses"]._flatten("sequence").get_group()
        self._sequence = Peers(sequence, guard, ranks.traffic)

    def sequence(self, tokens: int) -> Sequence:
        """How `tokens` tokens are split over this rank's branch."""
        if self.topology.sequence == 1:
            return WholeSequence()
        return SplitSequence(self._split(tokens), self._sequence)

    def attention(self, tokens: int, heads: int) -> SequenceGroup:
        """How attention over `tokens` tokens and `heads` heads is split."""
        return SequenceGroup(
            ulysses=self._ulysses,
            ring=self._ring,
            tokens=self._split(tokens),
            heads=Split.even(heads, self.topology.ulysses),
        )

    def branches(self, all_branches: tuple[_Branch, ...]) -> tuple[_Branch, ...]:
        """Those of the guidance branches that this rank computes."""
        return all_branches if self.topology.cfg == 1 else (all_branches[self.place.cfg],)

    def guidance(self, scale: float | None) -> Guidance:
        """What joins the branches; without a scale there is one."""
        if scale is None:
            return NoGuidance()
        return LocalGuidance(scale) if self.topology.cfg == 1 else SplitGuidance(scale, self._cfg)

    def _split(self, tokens: int) -> Split:
        return Split.even(tokens, self.topology.sequence)


class _ControlGuard:
    """Watches over small messages, among them those that say whether tensors may be transferred."""

    def __init__(self, watch: Watch):
        self._watch = watch

    def enter(self) -> None:
        self._watch.count()

    def check(self, waited: float) -> None:
        self._watch.check(waited)

    def blame(self, error: Exception) -> NoReturn:
        self._watch.blame(error)


@contextmanager
def join(
    rendezvous: Rendezvous,
    device: torch.device,
    *,
    timeout: float,
    backend: Backend | None = None,
    give_up: Callable[[LockstepError], None] | None = None,
) -> Iterator[Ranks]:
    """Meet the other ranks. While the block runs, a failure of any of them ends every wait of this one.

    Args:
        device: where this rank's tensors live.
        backend: gloo or nccl; by default nccl where every rank of a node has a GPU of its own.
        timeout: seconds within which a failure anywhere ends every other rank.
        give_up: see `Watch`.

    Raises:
        RankFailedError: another rank failed.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = backend or ("nccl" if device.type == "cuda" and not _shares_gpu() else "gloo")
    store, rank, world = next(iter(meet(rendezvous.address)))
    watch = Watch(PrefixStore("watch", store.clone()), rank, world, timeout, give_up)
    dist.init_process_group(
        "gloo" if backend == "gloo" else "cpu:gloo,cuda:nccl",
        store=PrefixStore("groups", store),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=max(600.0, 10 * timeout)),  # the watch ends waits long before
        device_id=device if backend == "nccl" else None,
    )
    watch.start()
    try:
        traffic = Traffic()
        control = Peers(dist.new_group(backend="gloo"), _ControlGuard(watch), Traffic())
        everyone = Peers(dist.group.WORLD, watch, traffic)
        node = Peers(_node_group(control), watch, traffic)
        yield Ranks(device, traffic, everyone=everyone, control=control, node=node, watch=watch)
    except BaseException as error:
        # A launcher that sees a rank die interrupts the others: to them that is a failure, no cancellation.
        interrupted = isinstance(error, KeyboardInterrupt | CancelledError)
        failure = watch.failure() if interrupted else None
        watch.end(failure or error)
        if rank == 0:
            watch.outlive()
        if failure is not None:
            raise failure from error
        raise
    watch.end()
    if rank == 0:
        watch.outlive()
    dist.destroy_process_group()


def minority(values: list[str]) -> list[int] | None:
    """Ranks whose value is not that of most (of a tie, that of rank 0); None if all agree."""
    if len(set(values)) == 1:
        return None
    usual = max(values, key=lambda value: (values.count(value), value == values[0]))
    return [rank for rank, value in enumerate(values) if value != usual]


def flatten(content: Any, path: str = "") -> dict[str, Any]:
    """Nested JSON as one level: `{"request.seed": 7, …}`."""
    if not isinstance(content, dict):
        return {path: content}
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= flatten(value, f"{path}.{key}" if path else str(key))
    return flat


def _node_group(control: Peers) -> dist.ProcessGroup | None:
    """The process group of this rank's machine."""
    hosts = control.tell(host_name())
    members = [[r for r, other in enumerate(hosts) if other == host] for host in dict.fromkeys(hosts)]
    group: dist.ProcessGroup | None = dist.new_subgroups_by_enumeration(members)[0]  # type: ignore[no-untyped-call]
    return group


def _shares_gpu() -> bool:
    """Whether a node has more ranks than GPUs; NCCL refuses two ranks on one."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > torch.cuda.device_count()
