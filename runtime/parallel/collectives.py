"""Transfers between ranks: exact, counted, and never waiting for a rank that has failed.

Every exchange during denoising is an all-to-all of unequal pieces: the Ulysses exchange, a ring pass (every
piece is empty but the next rank's), a gather (the same piece for every rank). Nothing is padded.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NoReturn, Protocol

import torch
import torch.distributed as dist

Shape = tuple[int, ...]

_ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13
_POLL = timedelta(milliseconds=50)  # time between two calls of the guard during a wait


@dataclass(slots=True)
class Traffic:
    """Bytes that this rank has sent to other ranks.

    Attributes:
        axes: axis of the topology, `everyone` or `node` → bytes sent along it.
    """

    axes: Counter[str] = field(default_factory=Counter)

    @property
    def sent(self) -> int:
        """All bytes."""
        return self.axes.total()


class Guard(Protocol):
    """Check whether a transfer can still succeed."""

    def enter(self) -> None:
        """Note that this rank starts a transfer; raise if it must not."""
        ...

    def check(self, waited: float) -> None:
        """Raise if a wait, of `waited` seconds so far, cannot succeed; called repeatedly during it."""
        ...

    def blame(self, error: Exception) -> NoReturn:
        """Raise an error that names the rank because of which a transfer broke."""
        ...


class Unguarded:
    """Guard of a single rank, which lets everything pass."""

    def enter(self) -> None:
        pass

    def check(self, waited: float) -> None:
        pass

    def blame(self, error: Exception) -> NoReturn:
        raise error


class Transfer:
    """A running all-to-all.

    Args:
        work: torch's handle; None if there was nothing to move.
        incoming: buffer that it fills.
        shapes: shapes of the pieces in the buffer, in rank order.
        guard: asked while waiting.
        polls: whether waiting blocks this thread; with NCCL the device's stream waits instead.
    """

    def __init__(
        self,
        work: dist.Work | None,
        incoming: torch.Tensor,
        shapes: Sequence[Shape],
        guard: Guard,
        *,
        polls: bool,
    ):
        self._work, self._incoming, self._shapes = work, incoming, shapes
        self._guard, self._polls = guard, polls

    def wait(self) -> list[torch.Tensor]:
        """Wait for the tensors that every rank sent to this one, in rank order.

        Raises:
            RankFailedError: they cannot arrive, because a rank has failed.
        """
        incoming = self.wait_joined()
        pieces = incoming.split_with_sizes([numel(shape) for shape in self._shapes])
        return [piece.view(shape) for piece, shape in zip(pieces, self._shapes, strict=True)]

    def wait_joined(self) -> torch.Tensor:
        """Wait as `wait` does; return all pieces one after the other, 1-dim."""
        if self._work is not None:
            finish(self._work, self._guard, polls=self._polls)
        return self._incoming


def finish(work: dist.Work, guard: Guard, *, polls: bool) -> None:
    """Wait for `work` for as long as `guard` does not raise."""
    try:
        waited = 0.0
        while polls and not work.is_completed():
            with contextlib.suppress(RuntimeError):  # raised when this poll timed out; see below
                work.wait(_POLL)
            waited += _POLL.total_seconds()
            if not work.is_completed():
                guard.check(waited)
        work.wait()
    except RuntimeError as error:
        guard.blame(error)


class _WatchedWork(dist.Work):
    """torch's handle of a transfer, for code that waits by itself; the guard is asked during the wait."""

    def __init__(self, work: dist.Work, guard: Guard, *, polls: bool):
        super().__init__()
        self._work, self._guard, self._polls = work, guard, polls

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        finish(self._work, self._guard, polls=self._polls)
        return True


class Peers:
    """Ranks that exchange tensors.

    Args:
        group: their process group; None for a single rank.
        guard: asked during every wait.
        traffic: counts the bytes that this rank sends.
        axis: name under which they are counted.
    """

    def __init__(
        self, group: dist.ProcessGroup | None, guard: Guard, traffic: Traffic, axis: str = "everyone"
    ):
        self.group, self._guard, self._traffic, self._axis = group, guard, traffic, axis
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)
        self._gloo = group is not None and dist.get_backend(group) == "gloo"

    @classmethod
    def alone(cls) -> Peers:
        """Make the peers of a single rank, which has none."""
        return cls(None, Unguarded(), Traffic())

    def start(self, pieces: Sequence[torch.Tensor], shapes: Sequence[Shape]) -> Transfer:
        """Send `pieces[r]` to rank r and receive a tensor of `shapes[r]` from it, in the background.

        All pieces have one dtype and device. `shapes` must be what the other ranks send.
        """
        flat = [piece.reshape(-1) for piece in pieces]
        outgoing = torch.cat(flat) if len(flat) > 1 else flat[0]
        return self.start_joined(outgoing, [piece.numel() for piece in pieces], shapes)

    def start_joined(self, outgoing: torch.Tensor, sizes: Sequence[int], shapes: Sequence[Shape]) -> Transfer:
        """Start a transfer as `start` does, of adjacent pieces of `sizes[r]` elements in one tensor."""
        if self.size == 1:
            return Transfer(None, outgoing, shapes, self._guard, polls=False)
        received = [numel(shape) for shape in shapes]
        incoming = outgoing.new_empty(sum(received))
        self._enter((sum(sizes) - sizes[self.rank]) * outgoing.element_size())
        work = self._move(incoming, outgoing, received, list(sizes))
        return Transfer(work, incoming, shapes, self._guard, polls=self._blocks(incoming))

    def all_to_all(self, pieces: Sequence[torch.Tensor], shapes: Sequence[Shape]) -> list[torch.Tensor]:
        """Send and receive as `start` does, and wait."""
        return self.start(pieces, shapes).wait()

    def gather(self, piece: torch.Tensor, shapes: Sequence[Shape]) -> list[torch.Tensor]:
        """Gather every rank's piece on every rank."""
        return self.all_to_all([piece] * self.size, shapes)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sum values over the ranks, in rank order: the same bits on every rank."""
        piece = torch.tensor(values, dtype=torch.float64)
        return torch.stack(self.gather(piece, [(len(values),)] * self.size)).sum(0).tolist()

    def all_gather_object(self, content: Any) -> list[Any]:
        """Gather every rank's `content`, which must be JSON, on every rank."""
        message = torch.frombuffer(bytearray(json.dumps(content).encode()), dtype=torch.uint8)
        lengths = self.gather(torch.tensor([message.numel()]), [(1,)] * self.size)
        messages = self.gather(message, [(int(length),) for length in lengths])
        return [json.loads(bytes(message.tolist())) for message in messages]

    def broadcast(self, tensor: torch.Tensor, source: int = 0) -> None:
        """Fill `tensor` with its value on the rank `source` of the group."""
        if self.size == 1:
            return
        self._enter(tensor.numel() * tensor.element_size() * (self.size - 1) if self.rank == source else 0)
        self._fill(tensor, source)

    def all_gather_into_tensor(self, output: torch.Tensor, piece: torch.Tensor) -> dist.Work:
        """Start to fill `output` with every rank's `piece`, all of one size, as FSDP requests it."""
        assert self.group is not None
        self._enter(piece.numel() * piece.element_size() * (self.size - 1))
        try:
            work = _ALL_GATHER(output, piece, group=self.group, async_op=True)
        except RuntimeError as error:
            self._guard.blame(error)
        return _WatchedWork(work, self._guard, polls=self._blocks(output))

    def _move(
        self, incoming: torch.Tensor, outgoing: torch.Tensor, received: list[int], sent: list[int]
    ) -> dist.Work | None:
        """Start an all-to-all of pieces of these lengths."""
        try:
            work: dist.Work | None = dist.all_to_all_single(
                incoming, outgoing, received, sent, group=self.group, async_op=True
            )
        except RuntimeError as error:
            self._guard.blame(error)
        return work

    def _fill(self, tensor: torch.Tensor, source: int) -> None:
        """Broadcast `tensor` from the rank `source` of the group."""
        assert self.group is not None
        try:
            work = dist.broadcast(tensor, group=self.group, group_src=source, async_op=True)
        except RuntimeError as error:
            self._guard.blame(error)
        finish(work, self._guard, polls=self._blocks(tensor))

    def _blocks(self, tensor: torch.Tensor) -> bool:
        """Return whether waiting for `tensor` blocks this thread: on the CPU, and with gloo."""
        return self._gloo or tensor.device.type == "cpu"

    def _enter(self, sent: int) -> None:
        self._guard.enter()
        self._traffic.axes[self._axis] += sent


def numel(shape: Shape) -> int:
    """Number of elements of a tensor of this shape."""
    return int(torch.Size(shape).numel())
