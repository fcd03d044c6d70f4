"""Ranks of one job, as one of them sees them: their meeting, their process groups, and its own share."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, Self, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from runtime.errors import BadRequestError, CancelledError, LockstepError, RankFailedError
from runtime.files.text import flatten
from runtime.parallel.attention import SequenceGroup
from runtime.parallel.collectives import Peers, Traffic, Unguarded
from runtime.parallel.devices import DeviceQueue
from runtime.parallel.groups import Backend, ProcessGroups
from runtime.parallel.guidance import Guidance, LocalGuidance, NoGuidance, SplitGuidance
from runtime.parallel.meeting import Rendezvous, leave, meet
from runtime.parallel.network import check_interfaces, choose_interface
from runtime.parallel.sequence import Split, SplitSequence, TokenSequence, WholeSequence
from runtime.parallel.topology import Topology, neighbours
from runtime.parallel.watch import Watch

_GLANCE = 0.0005  # seconds between two polls of the accelerator's queue

_Branch = TypeVar("_Branch")


class Ranks:
    """All ranks of one job, seen from one of them.

    Attributes:
        rank, size: number of this rank, and of ranks.
        device: device of this rank's tensors.
        everyone: transfers of device tensors between all ranks.
        control: transfers of small CPU messages between all ranks.
        node: transfers within this rank's machine.
        hosts: machine of every rank, as `host_name` has it.
        traffic: bytes that this rank has sent, except through `control`.
        per_node: the largest number of neighbours that never spans two machines, the same on every rank.
        watch: detects failures of other ranks; None on a single rank.
        groups: creates process groups; None on a single rank.
    """

    def __init__(
        self,
        device: torch.device,
        traffic: Traffic,
        *,
        everyone: Peers,
        control: Peers,
        node: Peers,
        hosts: Sequence[str] = (),
        per_node: int = 1,
        watch: Watch | None = None,
        groups: ProcessGroups | None = None,
    ):
        self.device, self.traffic = device, traffic
        self.everyone, self.control, self.node = everyone, control, node
        self.per_node = per_node
        self.watch, self.groups = watch, groups
        self.rank, self.size = control.rank, control.size
        self.hosts = tuple(hosts) or ("",) * self.size
        self._groups: dict[Topology, RankGroup] = {}

    @classmethod
    def alone(cls, device: torch.device) -> Self:
        """Make a single rank, which needs no process group."""
        peers = Peers.alone()
        return cls(device, Traffic(), everyone=peers, control=peers, node=peers)

    @property
    def is_leader(self) -> bool:
        """True on the rank that encodes text, writes files and talks to the user."""
        return self.rank == 0

    @property
    def first_here(self) -> int:
        """Number of the first rank on this rank's machine."""
        return self.hosts.index(self.hosts[self.rank])

    @property
    def leads_machine(self) -> bool:
        """True on the first rank of every machine."""
        return self.first_here == self.rank

    @property
    def several_machines(self) -> bool:
        """True if the ranks are on more than one machine."""
        return len(set(self.hosts)) > 1

    def group(self, topology: Topology) -> RankGroup:
        """Arrange the ranks as `topology`; all ranks must request the same topologies in the same order.

        Raises:
            ValueError: the topology has another number of ranks.
        """
        if topology.world != self.size:
            raise ValueError(f"{topology} needs {topology.world} ranks, there are {self.size}")
        if topology not in self._groups:
            self._groups[topology] = RankGroup(topology, self)
        return self._groups[topology]

    @property
    def where(self) -> str:
        """Current activity of this rank."""
        return "start" if self.watch is None else self.watch.where

    def at(self, where: str, *, busy: bool = False) -> None:
        """Set this rank's current activity, for errors that name it, and whether it may take long."""
        if self.watch is not None:
            self.watch.at(where, busy=busy)

    @contextmanager
    def busy(self, where: str) -> Iterator[None]:
        """Mark the block as an activity that may take long; see `Watch.busy`."""
        if self.watch is None:
            yield
            return
        with self.watch.busy(where):
            yield

    def before_transfer(self, confirm: Callable[[], None]) -> None:
        """Call `confirm` before every later transfer of tensors; it raises if the transfer must not start."""
        if self.watch is not None:
            self.watch.before_transfer = confirm

    def synchronize(self) -> None:
        """Wait for the accelerator's queue, or raise if it waits for a rank that has failed."""
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
        self.watch.check(0.0)  # work that the watch aborted is not done

    def agree(self, content: dict[str, Any]) -> None:
        """Check that all ranks are about to do the same.

        Args:
            content: JSON that must be equal on every rank.

        Raises:
            RankFailedError: `content` differs; the message names the rank and the first field that differs.
        """
        told = self.control.all_gather_object(content)
        odd = minority([repr(flatten(one)) for one in told])
        if odd is not None:
            usual = flatten(next(one for rank, one in enumerate(told) if rank not in odd))
            own = flatten(told[odd[0]])
            field = next(f for f in sorted({*usual, *own}) if usual.get(f) != own.get(f))
            reason = f"it has {field} = {own.get(field)!r} where other ranks have {usual.get(field)!r}"
            raise RankFailedError(odd[0], self.where, reason)

    def refuse_together(self, problem: str) -> None:
        """Refuse a request on all ranks if one of them has a problem with it.

        Args:
            problem: what is wrong with it on this rank; empty if nothing is.

        Raises:
            BadRequestError: a rank has a problem; the message is that of the first.
        """
        problems = [told for told in self.control.all_gather_object(problem) if told]
        if problems:
            raise BadRequestError(problems[0])

    def broadcast_tensors(self, own: list[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
        """Broadcast the first rank's tensors, all of `dtype`, to every rank's device.

        Args:
            own: the tensors on the first rank, empty on the others.
            dtype: their dtype.
        """
        shapes = self.control.all_gather_object([list(tensor.shape) for tensor in own])[0]
        tensors = own or [torch.empty(shape, dtype=dtype, device=self.device) for shape in shapes]
        for tensor in tensors:
            self.everyone.broadcast(tensor)
        return tensors

    def leading(self, count: int) -> Peers | None:
        """Peers of the first `count` ranks, all if there are not more; None on others. Collective."""
        if count >= self.size:
            return self.everyone
        assert self.groups is not None
        rows = [list(range(count)), list(range(count, self.size))]
        group = self.groups.of(rows, self.rank)
        return Peers(group, self.watch or Unguarded(), self.traffic) if self.rank < count else None

    def mesh(self) -> DeviceMesh:
        """Device mesh of all ranks in one dimension, for sharding weights."""
        return init_device_mesh(self.device.type, (self.size,))


class RankGroup:
    """All ranks, arranged along the axes of a topology.

    Args:
        topology: arrangement of `ranks.size` ranks.
        ranks: all ranks.
    """

    def __init__(self, topology: Topology, ranks: Ranks):
        self.topology = topology
        self.place = topology.place(ranks.rank)
        guard, groups = ranks.watch or Unguarded(), ranks.groups

        def peers(axis: str, rows: list[list[int]]) -> Peers:
            group = None if groups is None else groups.of(rows, ranks.rank)
            return Peers(group, guard, ranks.traffic, axis)

        axes = ("cfg", "ring", "ulysses")
        self._cfg, self._ring, self._ulysses = (
            peers(axis, topology.rows(number)) for number, axis in enumerate(axes)
        )
        self._sequence = peers("sequence", topology.rows(1, 2))

    def sequence(self, tokens: int) -> TokenSequence:
        """Split `tokens` tokens over the ranks of this rank's branch."""
        if self.topology.sequence == 1:
            return WholeSequence()
        return SplitSequence(self._split(tokens), self._sequence)

    def attention(self, tokens: int, heads: int) -> SequenceGroup:
        """Split attention over `tokens` tokens and `heads` heads."""
        return SequenceGroup(
            ulysses=self._ulysses,
            ring=self._ring,
            tokens=self._split(tokens),
            heads=Split.even(heads, self.topology.ulysses),
        )

    def branches(self, all_branches: tuple[_Branch, ...]) -> tuple[_Branch, ...]:
        """Guidance branches that this rank computes."""
        return all_branches if self.topology.cfg == 1 else (all_branches[self.place.cfg],)

    def guidance(self, scale: float | None) -> Guidance:
        """Guidance that joins the branches; without a scale there is only one branch."""
        if scale is None:
            return NoGuidance()
        return LocalGuidance(scale) if self.topology.cfg == 1 else SplitGuidance(scale, self._cfg)

    def _split(self, tokens: int) -> Split:
        return Split.even(tokens, self.topology.sequence)


class _ControlGuard:
    """Guard of small messages, including those that decide whether tensors may be transferred."""

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
    busy: float = math.inf,
    backend: Backend | None = None,
    give_up: Callable[[LockstepError], None] | None = None,
    on_failure: Callable[[], None] = lambda: None,
) -> Iterator[Ranks]:
    """Meet the other ranks. While the block runs, a failure of any of them ends every wait of this one.

    Args:
        rendezvous: where the ranks meet.
        device: device of this rank's tensors.
        timeout: seconds within which all ranks must arrive, and within which a failure anywhere ends every
            other rank.
        busy: limit in seconds for a single long activity of a rank, such as loading; by default none.
        backend: gloo or nccl; by default nccl if every rank of a node has a GPU of its own.
        give_up: see `Watch`.
        on_failure: called first when this rank fails, before it tells the others.

    Raises:
        BadRequestError: this rank or another refuses its request, or the name of an interface.
        RankFailedError: another rank did not arrive, or failed.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = backend or ("nccl" if device.type == "cuda" and not _shares_gpu() else "gloo")
    try:
        check_interfaces(nccl=backend == "nccl")
    except BadRequestError as error:
        leave(rendezvous, error)
        raise
    (store, places), rank, world = meet(rendezvous, timeout), rendezvous.rank, rendezvous.world
    own = store.clone()  # type: ignore[attr-defined]  # the stub forgets it
    watch = Watch(PrefixStore("watch", own), rank, world, timeout, give_up, busy, rendezvous.address)
    groups = ProcessGroups(backend, device, watch, timeout)
    watch.abort = groups.abort
    try:
        watch.start()
        choose_interface(rank, places, nccl=backend == "nccl")
        traffic = Traffic()
        everyone = Peers(groups.open(PrefixStore("groups", store), rank, world), watch, traffic)
        if backend == "nccl":
            watch.queue = DeviceQueue(device)
        control = Peers(groups.control(), _ControlGuard(watch), Traffic())
        nodes = _nodes([place.host for place in places])
        node = Peers(groups.of(nodes, rank), watch, traffic, "node")
        per_node = neighbours([place.host for place in places])
        yield Ranks(
            device,
            traffic,
            everyone=everyone,
            control=control,
            node=node,
            hosts=[place.host for place in places],
            per_node=per_node,
            watch=watch,
            groups=groups,
        )
    except BaseException as error:
        on_failure()
        # A launcher that sees a rank die interrupts the others: to them it is a failure, not a cancellation.
        interrupted = isinstance(error, KeyboardInterrupt | CancelledError)
        failure = watch.failure() if interrupted else None
        watch.end(failure or error)
        if rank == 0:
            watch.wait_for_others()
        if failure is not None:
            raise failure from error
        raise
    watch.end()
    if rank == 0:
        watch.wait_for_others()
    dist.destroy_process_group()


def minority(values: list[str]) -> list[int] | None:
    """Ranks whose value differs from the most frequent one (in a tie, rank 0's); None if all agree."""
    if len(set(values)) == 1:
        return None
    usual = max(values, key=lambda value: (values.count(value), value == values[0]))
    return [rank for rank, value in enumerate(values) if value != usual]


def _nodes(hosts: list[str]) -> list[list[int]]:
    """Ranks of each machine, from the host name of every rank."""
    return [[r for r, other in enumerate(hosts) if other == host] for host in dict.fromkeys(hosts)]


def _shares_gpu() -> bool:
    """Return whether this node has more ranks than GPUs; NCCL refuses two ranks on one GPU."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > torch.cuda.device_count()
