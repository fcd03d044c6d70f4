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
class Sign:
    """What a rank shows of itself.

    Attributes:
        host, pid, born: the process, so that others on the same host can see whether it still exists.
        beat: grows with every sign.
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
class Verdict:
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
    """For how many seconds a rank's sign has been the same, as seen from here.

    Attributes:
        silent: its beat: it shows no sign at all.
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


def judge(
    rank: int, own: Sign, wait: Wait, signs: Mapping[int, Sign], still: Mapping[int, Still], bounds: Bounds
) -> Verdict | None:
    """Whether any rank makes waiting vain, and which is the reason.

    Args:
        rank, own: this rank, and what it shows now.
        wait: how it stands with this rank's transfer.
        signs: the last sign of every rank.
        still: for how long each has been as it is.
    """
    others = {r: sign for r, sign in signs.items() if r != rank}
    return (
        _judge_ends(rank, signs)
        or _judge_life(own, others, still, bounds.patience)
        or _judge_work(signs, bounds.busy)
        or _judge_wait(rank, own, wait, signs, still, bounds.patience)
    )


def _judge_ends(rank: int, signs: Mapping[int, Sign]) -> Verdict | None:
    """Whether another rank says that it failed, or was cancelled; causes first."""
    for r, sign in sorted(signs.items(), key=lambda item: item[1].blames != item[0]):
        if r == rank:
            continue
        if sign.state is State.FAILED:
            where = sign.where if sign.blames is None else signs[sign.blames].where
            return Verdict(sign.blames, where, sign.reason, told=sign.explains)
        if sign.state is State.CANCELLED:
            return Verdict(r, sign.where, sign.reason, cancelled=True)
    return None


def _judge_life(
    own: Sign, others: Mapping[int, Sign], still: Mapping[int, Still], patience: float
) -> Verdict | None:
    """Whether a rank is no more, or has stopped."""
    for r, sign in others.items():
        if sign.state is not State.RUNNING:
            continue
        if is_gone(sign, own):
            return Verdict(r, sign.where, f"its process {sign.pid} died")
        silent = still.get(r, Still()).silent
        if silent >= patience:
            return Verdict(r, sign.where, f"it has shown no sign of life for {silent:.1f} s", silent=True)
    return None


def _judge_work(signs: Mapping[int, Sign], bound: float) -> Verdict | None:
    """Whether a rank, this one or another, has been at one thing for too long."""
    for r, sign in signs.items():
        if sign.state is State.RUNNING and sign.busy and sign.since >= bound:
            reason = f"it has been at this for {sign.since:.0f} s, and --busy-timeout is {bound:.0f} s"
            return Verdict(r, sign.where, reason)
    return None


def _judge_wait(
    rank: int,
    own: Sign,
    wait: Wait,
    signs: Mapping[int, Sign],
    still: Mapping[int, Still],
    patience: float,
) -> Verdict | None:
    """Which rank will never join this one's transfer, now that it has waited long, or the transfer broke."""
    if wait.seconds < patience and not wait.broken:
        return None
    behind = {r: sign for r, sign in signs.items() if r != rank and sign.entered < own.entered}
    for r, sign in behind.items():
        if sign.state is State.DONE:
            return Verdict(r, sign.where, f"it has ended before rank {rank} ({own.where})")
    if wait.seconds < patience:
        return None
    stuck = {
        r: sign
        for r, sign in signs.items()
        if sign.state is State.RUNNING and not sign.busy and still.get(r, Still()).stuck >= patience
    }
    waited = f"rank {rank} has waited for {wait.seconds:.1f} s at {own.where}"
    slow = {r: sign.entered for r, sign in stuck.items() if r in behind}
    if slow:
        last = min(slow, key=lambda r: slow[r])
        return Verdict(last, behind[last].where, f"it has not arrived, and {waited}")
    furthest = max(sign.reached for sign in signs.values())
    hung = {r: sign.reached for r, sign in stuck.items() if sign.reached < furthest}
    if hung:
        last = min(hung, key=lambda r: hung[r])
        return Verdict(last, signs[last].where, f"its device gets no further, and {waited}")
    return None


def host_name() -> str:
    """A name of this machine and process namespace, within which process numbers mean the same."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    namespace = Path("/proc/self/ns/pid")
    marks = [boot.read_text().strip()] if boot.is_file() else []
    marks += [str(namespace.readlink())] if namespace.is_symlink() else []
    return ":".join([socket.gethostname(), *marks])


def own_sign() -> Sign:
    """The first sign of this process."""
    return Sign(host=host_name(), pid=os.getpid(), born=psutil.Process().create_time())


def is_gone(sign: Sign, own: Sign) -> bool:
    """Whether a process on this host no longer runs; of other hosts this is not known."""
    if sign.host != own.host:
        return False
    try:
        process = psutil.Process(sign.pid)
        return bool(process.create_time() != sign.born or process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def ending(error: BaseException | None, rank: int) -> dict[str, Any]:
    """The fields of a sign that say how a rank ended."""
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
