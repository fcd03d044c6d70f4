"""Signs: what ranks show of themselves in a shared store, and how one judges those of the others."""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from runtime.errors import CancelledError, LockstepError, RankFailedError


class State(StrEnum):
    """How a rank is doing, by its own account."""

    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """What a rank shows of itself.

    Attributes:
        host, pid, born: the process, so that others on the same host can see whether it still exists.
        beat: grows with every heartbeat.
        where: what it is doing, such as `step 7`.
        busy: it is at something long that others may wait for, such as loading weights.
        since: seconds for which it has been at that, by its own clock; waits for other ranks do not count.
        entered: transfers it has started. Ranks run one program, so whoever has started fewer is behind.
        reached: of these, those that its accelerator's queue has come to.
        blames: the rank whose failure it reports, itself if it is its own; None if it cannot tell.
        explains: it failed by an error of its own, and says so to the user, too.
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
    state: State = State.RUNNING
    reason: str = ""
    blames: int | None = None
    explains: bool = False

    @property
    def progress(self) -> tuple[str, bool, int, int]:
        """What stays the same while it gets no further."""
        return self.where, self.busy, self.entered, self.reached


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Why waiting is in vain.

    Attributes:
        silent: the rank's process exists, but shows no sign of life: it will not end by itself.
        told: the rank itself explains it to the user.
    """

    rank: int | None
    where: str
    reason: str
    cancelled: bool = False
    silent: bool = False
    told: bool = False

    def error(self) -> LockstepError:
        if self.cancelled:
            return CancelledError(self.reason)
        return RankFailedError(self.rank, self.where, self.reason, self.told)


class Wait(NamedTuple):
    """A rank's wait in a transfer: for how many seconds, and whether the transfer has broken meanwhile."""

    seconds: float = 0.0
    broken: bool = False


class Still(NamedTuple):
    """For how many seconds a rank's heartbeat has been the same, as seen from here.

    Attributes:
        silent: its beat: it shows no heartbeat at all.
        stuck: its progress.
    """

    silent: float = 0.0
    stuck: float = 0.0


class Bounds(NamedTuple):
    """Seconds that things may take.

    Attributes:
        patience: silence, and a wait for a rank that gets no further.
        busy: what others may wait long for.
    """

    patience: float
    busy: float = math.inf


def diagnose(
    rank: int,
    own: Heartbeat,
    wait: Wait,
    heartbeats: Mapping[int, Heartbeat],
    still: Mapping[int, Still],
    bounds: Bounds,
) -> Diagnosis | None:
    """Whether any rank makes waiting vain, and which is the reason.

    Args:
        rank, own: this rank, and what it shows now.
        wait: how it stands with this rank's transfer.
        heartbeats: the last heartbeat of every rank.
        still: for how long each has been as it is.
    """
    others = {r: heartbeat for r, heartbeat in heartbeats.items() if r != rank}
    return (
        _diagnose_ends(rank, heartbeats)
        or _diagnose_life(own, others, still, bounds.patience)
        or _diagnose_work(heartbeats, bounds.busy)
        or _diagnose_wait(rank, own, wait, heartbeats, still, bounds.patience)
    )


def _diagnose_ends(rank: int, heartbeats: Mapping[int, Heartbeat]) -> Diagnosis | None:
    """Whether another rank says that it failed, or was cancelled; causes first."""
    for r, heartbeat in sorted(heartbeats.items(), key=lambda item: item[1].blames != item[0]):
        if r == rank:
            continue
        if heartbeat.state is State.FAILED:
            where = heartbeat.where if heartbeat.blames is None else heartbeats[heartbeat.blames].where
            return Diagnosis(heartbeat.blames, where, heartbeat.reason, told=heartbeat.explains)
        if heartbeat.state is State.CANCELLED:
            return Diagnosis(r, heartbeat.where, heartbeat.reason, cancelled=True)
    return None


def _diagnose_life(
    own: Heartbeat, others: Mapping[int, Heartbeat], still: Mapping[int, Still], patience: float
) -> Diagnosis | None:
    """Whether a rank is no more, or has stopped."""
    for r, heartbeat in others.items():
        if heartbeat.state is not State.RUNNING:
            continue
        if is_gone(heartbeat, own):
            return Diagnosis(r, heartbeat.where, f"its process {heartbeat.pid} died")
        silent = still.get(r, Still()).silent
        if silent >= patience:
            return Diagnosis(
                r, heartbeat.where, f"it has shown no sign of life for {silent:.1f} s", silent=True
            )
    return None


def _diagnose_work(heartbeats: Mapping[int, Heartbeat], bound: float) -> Diagnosis | None:
    """Whether a rank, this one or another, has been at one thing for too long."""
    for r, heartbeat in heartbeats.items():
        if heartbeat.state is State.RUNNING and heartbeat.busy and heartbeat.since >= bound:
            reason = f"it has been at this for {heartbeat.since:.0f} s, and --busy-timeout is {bound:.0f} s"
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
    """Which rank will never join this one's transfer, now that it has waited long, or the transfer broke."""
    if wait.seconds < patience and not wait.broken:
        return None
    behind = {
        r: heartbeat for r, heartbeat in heartbeats.items() if r != rank and heartbeat.entered < own.entered
    }
    for r, heartbeat in behind.items():
        if heartbeat.state is State.DONE:
            return Diagnosis(r, heartbeat.where, f"it has ended before rank {rank} ({own.where})")
    if wait.seconds < patience:
        return None
    stuck = {
        r: heartbeat
        for r, heartbeat in heartbeats.items()
        if heartbeat.state is State.RUNNING and not heartbeat.busy and still.get(r, Still()).stuck >= patience
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
        return Diagnosis(last, heartbeats[last].where, f"its device gets no further, and {waited}")
    return None


def host_name() -> str:
    """A name of this machine and process namespace, within which process numbers mean the same."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    namespace = Path("/proc/self/ns/pid")
    marks = [boot.read_text().strip()] if boot.is_file() else []
    marks += [str(namespace.readlink())] if namespace.is_symlink() else []
    return ":".join([socket.gethostname(), *marks])


def own_heartbeat() -> Heartbeat:
    """The first heartbeat of this process."""
    return Heartbeat(host=host_name(), pid=os.getpid(), born=psutil.Process().create_time())


def is_gone(heartbeat: Heartbeat, own: Heartbeat) -> bool:
    """Whether a process on this host no longer runs; of other hosts this is not known."""
    if heartbeat.host != own.host:
        return False
    try:
        process = psutil.Process(heartbeat.pid)
        return bool(process.create_time() != heartbeat.born or process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def ending(error: BaseException | None, rank: int) -> dict[str, Any]:
    """The fields of a heartbeat that say how a rank ended."""
    match error:
        case None:
            return {"state": State.DONE}
        case RankFailedError():
            return {"state": State.FAILED, "reason": error.reason, "blames": error.rank}
        case CancelledError() | KeyboardInterrupt():
            return {"state": State.CANCELLED, "reason": str(error) or f"rank {rank} was interrupted"}
        case _:
            reason = f"{type(error).__name__}: {error}"
            return {"state": State.FAILED, "reason": reason, "blames": rank, "explains": True}
