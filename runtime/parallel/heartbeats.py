"""Heartbeats that ranks publish in a shared store, and the diagnosis that a rank draws from the others'."""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from runtime.errors import (
    BadRequestError,
    CancelledError,
    LockstepError,
    RankFailedError,
    named,
    with_files,
)
from runtime.parallel.topology import machine_name


class RankState(StrEnum):
    """State of a rank, as it reports it itself."""

    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """A rank's heartbeat: its state and progress.

    Attributes:
        host, pid, born: the process, so that others on the same host can see whether it still exists.
        beat: number of the heartbeat.
        where: current activity, such as `step 7`.
        busy: whether the activity may take long, such as loading weights.
        since: seconds of that activity, by the rank's own clock, without waits for other ranks.
        entered: transfers started. Ranks run the same program, so one that has started fewer is behind.
        reached: transfers that its accelerator's queue has reached.
        state: whether it is running, or how it ended.
        reason: why it failed or was cancelled.
        blames: the rank whose failure it reports, itself if it is its own; None if unknown.
        explains: whether it failed with an error of its own, which it also explains to the user.
        refuses: whether it failed because the request cannot be served on its machine.
    """

    host: str
    pid: int
    born: float
    beat: int = 0
    where: str = "start"
    busy: bool = False
    since: float = 0.0
    entered: int = 0
    reached: int = 0
    state: RankState = RankState.RUNNING
    reason: str = ""
    blames: int | None = None
    explains: bool = False
    refuses: bool = False

    @property
    def machine(self) -> str:
        """Name of its machine, for people."""
        return machine_name(self.host)

    @property
    def progress(self) -> tuple[str, bool, int, int]:
        """Fields that stay the same while the rank makes no progress."""
        return self.where, self.busy, self.entered, self.reached


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Reason why waiting for other ranks cannot succeed.

    Attributes:
        rank: the rank that has failed or was cancelled; None if unknown.
        where: its activity.
        reason: why.
        cancelled: whether it was cancelled.
        silent: whether its process exists without a heartbeat, so that it will not end by itself.
        told: whether the rank itself explains the failure to the user.
        refused: whether the rank refuses its part of the request.
        host: name of the rank's machine; empty if all ranks are on one.
    """

    rank: int | None
    where: str
    reason: str
    cancelled: bool = False
    silent: bool = False
    told: bool = False
    refused: bool = False
    host: str = ""

    def error(self) -> LockstepError:
        if self.cancelled:
            return CancelledError(self.reason)
        if self.refused:
            place = self.host and f" on {self.host}"
            return BadRequestError(f"rank {self.rank}{place} refuses: {self.reason}")
        return RankFailedError(self.rank, self.where, self.reason, self.told, self.host)


class Wait(NamedTuple):
    """A rank's wait in a transfer: its seconds so far, and whether the transfer has broken."""

    seconds: float = 0.0
    broken: bool = False


class Still(NamedTuple):
    """Seconds since a rank's last heartbeat and its last progress, by this rank's clock.

    Attributes:
        silent: seconds since its last heartbeat.
        stuck: seconds since its last progress.
    """

    silent: float = 0.0
    stuck: float = 0.0


class Bounds(NamedTuple):
    """Time limits, in seconds.

    Attributes:
        patience: limit of silence, and of a wait for a rank that makes no progress.
        busy: limit of an activity that may take long.
        transfer: limit of a transfer that all ranks have started, and in which none makes progress.
    """

    patience: float
    busy: float = math.inf
    transfer: float = math.inf


def diagnose(
    rank: int,
    own: Heartbeat,
    wait: Wait,
    heartbeats: Mapping[int, Heartbeat],
    still: Mapping[int, Still],
    bounds: Bounds,
) -> Diagnosis | None:
    """Diagnose which rank, if any, makes waiting pointless.

    Args:
        rank, own: this rank, and its current heartbeat.
        wait: this rank's wait in a transfer.
        heartbeats: the last heartbeat of every rank.
        still: seconds since each rank's last heartbeat and progress.
        bounds: time limits.
    """
    others = {r: heartbeat for r, heartbeat in heartbeats.items() if r != rank}
    found = (
        _diagnose_ends(rank, heartbeats)
        or _diagnose_life(own, others, still, bounds.patience)
        or _diagnose_work(heartbeats, bounds.busy)
        or _diagnose_wait(rank, own, wait, heartbeats, still, bounds.patience)
        or _diagnose_network(rank, own, wait, heartbeats, still, bounds.transfer)
    )
    return found and replace(found, host=machine_of(found.rank, heartbeats))


def machine_of(rank: int | None, heartbeats: Mapping[int, Heartbeat]) -> str:
    """Name of a rank's machine, for people; empty if it is unknown, or all ranks are on the same."""
    several = len({heartbeat.host for heartbeat in heartbeats.values()}) > 1
    return heartbeats[rank].machine if several and rank is not None and rank in heartbeats else ""


def _diagnose_ends(rank: int, heartbeats: Mapping[int, Heartbeat]) -> Diagnosis | None:
    """Diagnose a rank that reports that it failed or was cancelled; causes before consequences."""
    for r, heartbeat in sorted(heartbeats.items(), key=lambda item: item[1].blames != item[0]):
        if r == rank:
            continue
        if heartbeat.state is RankState.FAILED:
            where = heartbeat.where if heartbeat.blames is None else heartbeats[heartbeat.blames].where
            told, refused = heartbeat.explains, heartbeat.refuses
            return Diagnosis(heartbeat.blames, where, heartbeat.reason, told=told, refused=refused)
        if heartbeat.state is RankState.CANCELLED:
            return Diagnosis(r, heartbeat.where, heartbeat.reason, cancelled=True)
    return None


def _diagnose_life(
    own: Heartbeat, others: Mapping[int, Heartbeat], still: Mapping[int, Still], patience: float
) -> Diagnosis | None:
    """Diagnose a rank whose process has died, or has stopped."""
    for r, heartbeat in others.items():
        if heartbeat.state is not RankState.RUNNING:
            continue
        if is_gone(heartbeat, own):
            return Diagnosis(r, heartbeat.where, f"its process {heartbeat.pid} died")
        silent = still.get(r, Still()).silent
        if silent >= patience:
            said = f"it has shown no sign of life for {silent:.1f} s"
            if heartbeat.host != own.host:
                said += _lost_machine(r, others, still, patience)
            return Diagnosis(r, heartbeat.where, said, silent=True)
    return None


def _lost_machine(
    rank: int, others: Mapping[int, Heartbeat], still: Mapping[int, Still], patience: float
) -> str:
    """Say that the machine of a silent rank is lost, if no rank there gives a sign of life any more."""
    host = others[rank].host
    mates = [r for r, one in others.items() if one.host == host and one.state is RankState.RUNNING]
    if any(still.get(r, Still()).silent < patience / 2 for r in mates):
        return ""
    more = f", nor has any of {len(mates)} ranks there" if len(mates) > 1 else ""
    return f"{more}: {others[rank].machine} is down, or the network to it is cut"


def _diagnose_work(heartbeats: Mapping[int, Heartbeat], bound: float) -> Diagnosis | None:
    """Diagnose a rank, possibly this one, whose current activity has taken too long."""
    for r, heartbeat in heartbeats.items():
        if heartbeat.state is RankState.RUNNING and heartbeat.busy and heartbeat.since >= bound:
            reason = f"it has been busy with this for {heartbeat.since:.0f} s; busy_timeout is {bound:.0f} s"
            return Diagnosis(r, heartbeat.where, reason)
    return None


def _diagnose_wait(
    rank: int,
    own: Heartbeat,
    wait: Wait,
    heartbeats: Mapping[int, Heartbeat],
    still: Mapping[int, Still],
    patience: float,
) -> Diagnosis | None:
    """Diagnose the rank that cannot join this one's transfer, which has waited too long or has broken."""
    if wait.seconds < patience and not wait.broken:
        return None
    behind = {
        r: heartbeat for r, heartbeat in heartbeats.items() if r != rank and heartbeat.entered < own.entered
    }
    for r, heartbeat in behind.items():
        if heartbeat.state is RankState.DONE:
            return Diagnosis(r, heartbeat.where, f"it has ended before rank {rank} ({own.where})")
    if wait.seconds < patience:
        return None
    stuck = {
        r: heartbeat
        for r, heartbeat in heartbeats.items()
        if heartbeat.state is RankState.RUNNING
        and not heartbeat.busy
        and still.get(r, Still()).stuck >= patience
    }
    waited = f"rank {rank} has waited for {wait.seconds:.1f} s at {own.where}"
    slow = {r: heartbeat.entered for r, heartbeat in stuck.items() if r in behind}
    if slow:
        last = min(slow, key=lambda r: slow[r])
        return Diagnosis(last, behind[last].where, f"it has not arrived, and {waited}")
    furthest = max(heartbeat.reached for heartbeat in heartbeats.values())
    hung = {r: heartbeat.reached for r, heartbeat in stuck.items() if heartbeat.reached < furthest}
    if hung:
        last = min(hung, key=lambda r: hung[r])
        return Diagnosis(last, heartbeats[last].where, f"its device makes no progress, and {waited}")
    return None


def _diagnose_network(
    rank: int,
    own: Heartbeat,
    wait: Wait,
    heartbeats: Mapping[int, Heartbeat],
    still: Mapping[int, Still],
    bound: float,
) -> Diagnosis | None:
    """Diagnose a transfer that all ranks have started, and that gets no further: their data does not pass."""
    waits = [
        one.state is RankState.RUNNING and not one.busy and still.get(r, Still()).stuck >= bound
        for r, one in heartbeats.items()
    ]
    if wait.seconds < bound or not all(waits):
        return None
    machines = sorted({one.machine for one in heartbeats.values()})
    between = ", ".join(machines) if len(machines) > 1 else "the ranks"
    return Diagnosis(
        None,
        own.where,
        f"all ranks wait for data, rank {rank} for {wait.seconds:.1f} s, while their store answers: "
        f"the data does not pass between {between}; a firewall, a cut link or the interfaces "
        "(GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME) may be the cause",
    )


def host_name() -> str:
    """Name of this machine and process namespace, within which a process number is unique."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    namespace = Path("/proc/self/ns/pid")
    marks = [boot.read_text().strip()] if boot.is_file() else []
    marks += [str(namespace.readlink())] if namespace.is_symlink() else []
    return ":".join([socket.gethostname(), *marks])


def own_heartbeat() -> Heartbeat:
    """Make the first heartbeat of this process."""
    return Heartbeat(host=host_name(), pid=os.getpid(), born=psutil.Process().create_time())


def is_gone(heartbeat: Heartbeat, own: Heartbeat) -> bool:
    """Return whether a process no longer runs; False on another host, where this is unknown."""
    if heartbeat.host != own.host:
        return False
    try:
        process = psutil.Process(heartbeat.pid)
        return bool(process.create_time() != heartbeat.born or process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def ending(error: BaseException | None, rank: int) -> dict[str, Any]:
    """Fields of a heartbeat that say how a rank ended."""
    match error:
        case None:
            return {"state": RankState.DONE}
        case RankFailedError():
            return {"state": RankState.FAILED, "reason": error.reason, "blames": error.rank}
        case CancelledError() | KeyboardInterrupt():
            return {"state": RankState.CANCELLED, "reason": str(error) or f"rank {rank} was interrupted"}
    own = {"state": RankState.FAILED, "reason": named(error), "blames": rank, "explains": True}
    if isinstance(error, BadRequestError):
        return own | {"reason": str(error), "refuses": True}
    if isinstance(error, OSError) and error.filename is not None:
        return own | {"reason": f"{type(error).__name__}: {with_files(error)}"}
    return own
