"""The watch: every rank shows signs of life in a shared store and looks at the others', so that nobody waits
for a rank that will not come.

A thread publishes this rank's sign a few times within the timeout and judges the others'. The main thread
asks for the verdict whenever it waits for other ranks, so a dead, stalled, failed or cancelled rank ends the
wait of all, with one error that names it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import psutil
from torch.distributed import Store  # type: ignore[attr-defined]

from runtime.errors import CancelledError, LockstepError, RankFailedError

log = logging.getLogger(__name__)

_TICKS = 10  # signs within one timeout, and at least one a second
_PATIENCE = 0.8  # part of the timeout after which silence is a failure; the rest is for telling everybody


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
        entered: transfers it has started. Ranks run one program, so whoever has started fewer is behind.
        blames: the rank whose failure it reports, itself if it is its own; None if it cannot tell.
    """

    host: str
    pid: int
    born: float
    beat: int = 0
    where: str = "start"
    busy: bool = False
    entered: int = 0
    state: State = State.RUNNING
    reason: str = ""
    blames: int | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why waiting is in vain.

    Attributes:
        silent: the rank's process exists, but shows no sign of life: it will not end by itself.
    """

    rank: int | None
    where: str
    reason: str
    cancelled: bool = False
    silent: bool = False

    def error(self) -> LockstepError:
        if self.cancelled:
            return CancelledError(self.reason)
        return RankFailedError(self.rank, self.where, self.reason)


class Watch:
    """Watches over the ranks of one job, from one of them.

    Args:
        store: shared by all ranks; this object's own connection.
        rank, size: this rank, and how many there are.
        timeout: seconds within which a failure anywhere ends every wait here.
        give_up: called with the error when the main thread has not taken notice of it within another
            `timeout`: it is stuck where it cannot ask. None leaves it there.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        timeout: float,
        give_up: Callable[[LockstepError], None] | None = None,
    ):
        self.timeout = timeout
        self.before_transfer: Callable[[], None] = _nothing  # raises if this rank should not start one
        self._store, self._rank, self._size = store, rank, size
        self._patience, self._tick = _PATIENCE * timeout, min(1.0, timeout / _TICKS)
        store.set_timeout(timedelta(seconds=self._patience))
        self._give_up = give_up
        self._sign = _own_sign()
        self._lock = threading.Lock()
        self._verdict: Verdict | None = None
        self._told = threading.Event()  # the main thread knows the verdict, or this rank has ended by itself
        self._wake, self._closed = threading.Event(), threading.Event()
        self._waited, self._broken = 0.0, False
        self._seen: dict[int, Sign] = {}
        self._changed: dict[int, float] = {}
        self._swept = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="lockstep-watch", daemon=True)

    def start(self) -> None:
        """Show the first sign and begin to look at the others', once they have all shown theirs."""
        self._publish()
        self._store.wait([_key(rank) for rank in range(self._size)], timedelta(seconds=10 * self.timeout))
        self._swept = time.monotonic()
        self._thread.start()

    @property
    def where(self) -> str:
        """What this rank is doing."""
        return self._sign.where

    def at(self, where: str, *, busy: bool = False) -> None:
        """Say what this rank is doing, and whether it is something that others may wait long for."""
        self._change(where=where, busy=busy)
        self._wake.set()

    def enter(self) -> None:
        """This rank starts a transfer of tensors."""
        self.before_transfer()
        self.count()

    def count(self) -> None:
        """This rank starts a transfer of any kind."""
        self._waited = 0.0
        self._change(entered=self._sign.entered + 1)

    def check(self, waited: float) -> None:
        """Raise if waiting is in vain; called during a wait of `waited` seconds so far.

        Raises:
            RankFailedError: a rank is dead, stalled or has failed.
            CancelledError: a rank was cancelled.
        """
        self._waited = waited
        silent = time.monotonic() - self._swept
        if self._verdict is None and silent > 2 * self.timeout:
            self._verdict = Verdict(None, self.where, f"the ranks' store has not answered for {silent:.0f} s")
        self._raise_verdict()

    def blame(self, error: Exception) -> NoReturn:
        """A transfer broke; name the rank that is the reason, once it is known.

        Raises:
            RankFailedError: always.
        """
        self._broken = True
        deadline = time.monotonic() + self.timeout
        while time.monotonic() < deadline:
            self._raise_verdict()
            time.sleep(self._tick / 4)
        self._told.set()
        said = str(error).splitlines()[0]
        raise RankFailedError(None, self.where, f"a transfer between ranks broke: {said}") from error

    def failure(self) -> LockstepError | None:
        """Look now: the error that another rank's failure means for this one, if there is a failure."""
        if self._verdict is None:
            try:
                self._notice(self._read())
            except RuntimeError as error:
                self._lose_store(error)
        return None if self._verdict is None or self._verdict.cancelled else self._verdict.error()

    def end(self, error: BaseException | None = None) -> None:
        """This rank leaves, because it is done or because of `error`; the others are told which."""
        self._told.set()
        self._change(**_ending(error, self._rank))
        try:
            self._publish()
        except RuntimeError:
            log.warning("could not tell the other ranks how this one ended: the store is gone")
        if self._verdict is not None and self._verdict.silent:
            self._fence(self._verdict.rank)
        self._closed.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(self.timeout)

    def _fence(self, rank: int | None) -> None:
        """End a process on this host that has been given up: should it ever wake, it must do no harm."""
        sign = self._seen.get(rank) if rank is not None else None
        if sign is not None and sign.host == self._sign.host and not _is_gone(sign, self._sign):
            log.warning("rank %s (process %s) shows no sign of life and is killed", rank, sign.pid)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(sign.pid, signal.SIGKILL)

    def outlive(self) -> None:
        """Wait until every other rank has ended, or shows no sign of life. The store's host does so."""
        deadline = time.monotonic() + self.timeout
        others = [rank for rank in range(self._size) if rank != self._rank]
        while time.monotonic() < deadline:
            try:
                signs = self._read()
            except RuntimeError:
                return
            if all(signs[r].state is not State.RUNNING or _is_gone(signs[r], self._sign) for r in others):
                return
            time.sleep(self._tick / 4)

    def _raise_verdict(self) -> None:
        if self._verdict is not None:
            self._told.set()
            raise self._verdict.error()

    def _run(self) -> None:
        """Publish when something changes and at every tick; look at the others at every tick."""
        while self._verdict is None:
            self._wake.wait(self._tick)
            self._wake.clear()
            if self._closed.is_set():
                return
            try:
                self._publish()
                if time.monotonic() - self._swept >= self._tick:
                    self._notice(self._read())
                    self._swept = time.monotonic()
            except RuntimeError as error:
                self._lose_store(error)
        if not self._told.wait(self.timeout) and self._give_up is not None:
            self._give_up(self._verdict.error())

    def _change(self, **fields: Any) -> None:
        with self._lock:  # both threads change the sign
            self._sign = replace(self._sign, **fields)

    def _publish(self) -> None:
        self._change(beat=self._sign.beat + 1)
        self._store.set(_key(self._rank), json.dumps(asdict(self._sign)))

    def _read(self) -> dict[int, Sign]:
        values = self._store.multi_get([_key(rank) for rank in range(self._size)])
        signs = [Sign(**json.loads(value)) for value in values]
        return {rank: replace(sign, state=State(sign.state)) for rank, sign in enumerate(signs)}

    def _notice(self, signs: Mapping[int, Sign]) -> None:
        now = time.monotonic()
        for rank, sign in signs.items():
            if rank not in self._seen or sign.beat != self._seen[rank].beat:
                self._changed[rank] = now
        self._seen = dict(signs)
        silent = {rank: now - changed for rank, changed in self._changed.items()}
        wait = Wait(self._waited, self._broken)
        self._verdict = judge(self._rank, self._sign, wait, signs, silent, self._patience)

    def _lose_store(self, error: RuntimeError) -> None:
        """The store lives in the first rank, or in its launcher: one of them is gone or has stopped."""
        first = self._seen.get(0)
        if self._rank != 0 and first is not None and first.state is State.RUNNING:
            reason = "it died" if _is_gone(first, self._sign) else "it shows no sign of life"
            said = str(error).splitlines()[0]
            self._verdict = Verdict(0, self.where, f"{reason}, or the store beside it is gone ({said})")
        else:
            self._verdict = Verdict(None, self.where, f"the ranks' store is gone: {error}")


class Wait(NamedTuple):
    """A rank's wait in a transfer: for how many seconds, and whether the transfer has broken meanwhile."""

    seconds: float = 0.0
    broken: bool = False


def judge(
    rank: int,
    own: Sign,
    wait: Wait,
    signs: Mapping[int, Sign],
    silent: Mapping[int, float],
    patience: float,
) -> Verdict | None:
    """Whether any rank makes waiting vain, and which is the reason.

    Args:
        rank, own: this rank, and what it shows now.
        wait: how it stands with this rank's transfer.
        signs: the last sign of every rank.
        silent: seconds for which each rank's sign has been the same.
        patience: seconds that silence or a wait may last.
    """
    others = {r: sign for r, sign in signs.items() if r != rank}
    for r, sign in sorted(others.items(), key=lambda item: item[1].blames != item[0]):  # causes first
        if sign.state is State.FAILED:
            blamed = sign.blames
            where = sign.where if blamed is None or blamed == r else signs[blamed].where
            return Verdict(blamed, where, sign.reason)
        if sign.state is State.CANCELLED:
            return Verdict(r, sign.where, sign.reason, cancelled=True)
    for r, sign in others.items():
        if sign.state is State.RUNNING and _is_gone(sign, own):
            return Verdict(r, sign.where, f"its process {sign.pid} died")
        if sign.state is State.RUNNING and silent.get(r, 0.0) >= patience:
            return Verdict(r, sign.where, f"it has shown no sign of life for {silent[r]:.1f} s", silent=True)
    behind = {r: sign for r, sign in others.items() if sign.entered < own.entered}
    return _judge_wait(rank, own, wait, behind, patience)


def _judge_wait(
    rank: int, own: Sign, wait: Wait, behind: Mapping[int, Sign], patience: float
) -> Verdict | None:
    """Whether those who are `behind` in transfers will never join this rank's."""
    left = [r for r, sign in behind.items() if sign.state is State.DONE]
    if left and (wait.broken or wait.seconds >= patience):
        return Verdict(left[0], behind[left[0]].where, f"it has ended before rank {rank} ({own.where})")
    slow = {r: sign.entered for r, sign in behind.items() if not sign.busy}
    if slow and wait.seconds >= patience:
        last = min(slow, key=lambda r: slow[r])
        reason = f"it has not arrived, and rank {rank} has waited for {wait.seconds:.1f} s at {own.where}"
        return Verdict(last, behind[last].where, reason)
    return None


def _nothing() -> None:
    pass


def host_name() -> str:
    """A name of this machine and process namespace, within which process numbers mean the same."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    namespace = Path("/proc/self/ns/pid")
    marks = [boot.read_text().strip()] if boot.is_file() else []
    marks += [str(namespace.readlink())] if namespace.is_symlink() else []
    return ":".join([socket.gethostname(), *marks])


def _own_sign() -> Sign:
    return Sign(host=host_name(), pid=os.getpid(), born=psutil.Process().create_time())


def _is_gone(sign: Sign, own: Sign) -> bool:
    """Whether a process on this host no longer runs; of other hosts this is not known."""
    if sign.host != own.host:
        return False
    try:
        process = psutil.Process(sign.pid)
        return bool(process.create_time() != sign.born or process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def _ending(error: BaseException | None, rank: int) -> dict[str, Any]:
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
            return {"state": State.FAILED, "reason": reason, "blames": rank}


def _key(rank: int) -> str:
    return f"sign/{rank}"
