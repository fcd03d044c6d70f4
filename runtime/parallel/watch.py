"""The watch: every rank shows signs of life in a shared store and looks at the others', so that nobody waits
for a rank that will not come.

A thread publishes this rank's heartbeat a few times within the timeout and looks at the others'. The main
thread asks for the diagnosis whenever it waits for other ranks, so a dead, stalled, failed or cancelled rank
ends the wait of all, with one error that names it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from datetime import timedelta
from typing import Any, NoReturn, Protocol

from torch.distributed import Store  # type: ignore[attr-defined]

from runtime.errors import LockstepError, RankFailedError
from runtime.parallel.heartbeats import (
    Bounds,
    Diagnosis,
    Heartbeat,
    State,
    Still,
    Wait,
    diagnose,
    ending,
    is_gone,
    own_heartbeat,
)
from runtime.parallel.meeting import MEETING, in_background

log = logging.getLogger(__name__)

_TICKS = 10  # heartbeats within one timeout, and at least one a second
_PATIENCE = 0.8  # part of the timeout after which silence is a failure; the rest is for telling everybody
_GRACE = 20.0  # seconds, at most, in which the main thread should hear a diagnosis; agents kill after 30


class Queue(Protocol):
    """What an accelerator has been given to do."""

    def mark(self) -> None:
        """Something that others wait for begins here."""
        ...

    def reached(self) -> int:
        """How many of these the accelerator has come to; asked from another thread."""
        ...


class Watch:
    """Watches over the ranks of one job, from one of them.

    Args:
        store: shared by all ranks; this object's own connection.
        rank, size: this rank, and how many there are.
        timeout: seconds within which a failure anywhere ends every wait here.
        busy: seconds that any rank may be at one thing that others may wait long for.
        give_up: called with the error when the main thread has not taken notice of it within another
            `timeout`, at most 20 s: it is stuck where it cannot ask. None leaves it there.

    Attributes:
        before_transfer: raises if this rank should not start one.
        queue: of this rank's accelerator, where ranks wait for each other there.
        abort: ends what the accelerator waits for in vain; called from the watch's thread.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        timeout: float,
        give_up: Callable[[LockstepError], None] | None = None,
        busy: float = math.inf,
    ):
        self.timeout = timeout
        self.before_transfer: Callable[[], None] = _nothing
        self.abort: Callable[[], None] = _nothing
        self.queue: Queue | None = None
        self._store, self._rank, self._size = store, rank, size
        self._bounds, self._tick = Bounds(_PATIENCE * timeout, busy), min(1.0, timeout / _TICKS)
        store.set_timeout(timedelta(seconds=self._bounds.patience))
        self._give_up = give_up
        self._heartbeat, self._began = own_heartbeat(), time.monotonic()
        self._lock = threading.Lock()
        self._diagnosis: Diagnosis | None = None
        self._told = (
            threading.Event()
        )  # the main thread knows the diagnosis, or this rank has ended by itself
        self._wake, self._closed = threading.Event(), threading.Event()
        self._waited, self._broken = 0.0, False
        self._seen: dict[int, Heartbeat] = {}
        self._beaten: dict[int, float] = {}  # rank → when its beat was seen to change
        self._moved: dict[int, float] = {}  # and when its progress was
        self._swept = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="lockstep-watch", daemon=True)

    def start(self) -> None:
        """Show the first heartbeat and begin to look at the others', once they have all shown theirs."""
        self._publish()
        keys = [_key(rank) for rank in range(self._size)]
        try:
            in_background(lambda: self._store.wait(keys, timedelta(seconds=self.timeout)), lambda _: None)
        except RuntimeError as error:
            said = str(error).splitlines()[0]
            raise RankFailedError(None, MEETING, f"a rank came and showed no sign of life ({said})") from None
        self._swept = time.monotonic()
        self._thread.start()

    @property
    def where(self) -> str:
        """What this rank is doing."""
        return self._heartbeat.where

    def at(self, where: str, *, busy: bool = False) -> None:
        """Say what this rank is doing, and whether it is something that others may wait long for."""
        self._began = time.monotonic()
        self._change(where=where, busy=busy)
        self._wake.set()

    @contextlib.contextmanager
    def busy(self, where: str) -> Iterator[None]:
        """While the block runs, this rank is at something that others may wait long for; then at what it was
        before. If the block fails, it failed there."""
        before = self._heartbeat
        self.at(where, busy=True)
        yield
        self.at(before.where, busy=before.busy)

    def enter(self) -> None:
        """This rank starts a transfer of tensors."""
        self.before_transfer()
        self.count()
        if self.queue is not None:
            self.queue.mark()

    def count(self) -> None:
        """This rank starts a transfer of any kind."""
        self._waited, self._began = 0.0, time.monotonic()
        self._change(entered=self._heartbeat.entered + 1)

    def check(self, waited: float) -> None:
        """Raise if waiting is in vain; called during a wait of `waited` seconds so far.

        Raises:
            RankFailedError: a rank is dead, stalled or has failed.
            CancelledError: a rank was cancelled.
        """
        self._waited, self._began = waited, time.monotonic()
        silent = time.monotonic() - self._swept
        if self._diagnosis is None and silent > 2 * self.timeout:
            self._diagnosis = Diagnosis(
                None, self.where, f"the ranks' store has not answered for {silent:.0f} s"
            )
        self._raise_diagnosis()

    def blame(self, error: Exception) -> NoReturn:
        """A transfer broke; name the rank that is the reason, once it is known.

        Raises:
            RankFailedError: always.
        """
        self._broken = True
        deadline = time.monotonic() + self.timeout
        while time.monotonic() < deadline:
            self._raise_diagnosis()
            time.sleep(self._tick / 4)
        self._told.set()
        said = str(error).splitlines()[0]
        raise RankFailedError(None, self.where, f"a transfer between ranks broke: {said}") from error

    def failure(self) -> LockstepError | None:
        """Look now: the error that another rank's failure means for this one, if there is a failure."""
        if self._diagnosis is None:
            try:
                self._notice(self._read())
            except RuntimeError as error:
                self._lose_store(error)
        return None if self._diagnosis is None or self._diagnosis.cancelled else self._diagnosis.error()

    def end(self, error: BaseException | None = None) -> None:
        """This rank leaves, because it is done or because of `error`; the others are told which."""
        self._told.set()
        self._change(**ending(error, self._rank))
        try:
            self._publish()
        except RuntimeError:
            log.warning("could not tell the other ranks how this one ended: the store is gone")
        if self._diagnosis is not None and self._diagnosis.silent:
            self._fence(self._diagnosis.rank)
        self._closed.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(self.timeout)

    def _fence(self, rank: int | None) -> None:
        """End a process on this host that has been given up: should it ever wake, it must do no harm."""
        heartbeat = self._seen.get(rank) if rank is not None else None
        if (
            heartbeat is not None
            and heartbeat.host == self._heartbeat.host
            and not is_gone(heartbeat, self._heartbeat)
        ):
            log.warning("rank %s (process %s) shows no sign of life and is killed", rank, heartbeat.pid)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(heartbeat.pid, signal.SIGKILL)

    def wait_for_others(self) -> None:
        """Wait until every other rank has ended, or shows no sign of life. The store's host does so."""
        deadline = time.monotonic() + self.timeout
        others = [rank for rank in range(self._size) if rank != self._rank]
        while time.monotonic() < deadline:
            try:
                heartbeats = self._read()
            except RuntimeError:
                return
            if all(
                heartbeats[r].state is not State.RUNNING or is_gone(heartbeats[r], self._heartbeat)
                for r in others
            ):
                return
            time.sleep(self._tick / 4)

    def _raise_diagnosis(self) -> None:
        if self._diagnosis is not None:
            self._told.set()
            raise self._diagnosis.error()

    def _run(self) -> None:
        """Publish when something changes and at every tick; look at the others at every tick."""
        while self._diagnosis is None:
            self._wake.wait(self._tick)
            self._wake.clear()
            if self._closed.is_set():
                return
            try:
                self._publish()
                if self._diagnosis is None and time.monotonic() - self._swept >= self._tick:
                    self._notice(self._read())
                    self._swept = time.monotonic()
            except RuntimeError as error:
                self._lose_store(error)
        self._act(self._diagnosis.error())

    def _act(self, error: LockstepError) -> None:
        """The main thread hears of `error` when it asks next; help it there, or give it up."""
        try:
            self.abort()
        except RuntimeError as trouble:
            log.warning("what the device waits for could not be ended: %s", trouble)
        deadline = time.monotonic() + min(self.timeout, _GRACE)
        if (
            not self._told.is_set()
        ):  # from now on it shows no more heartbeats, and must not be taken for the cause
            self._change(**ending(error, self._rank))
            with contextlib.suppress(RuntimeError):  # the store may be what is gone
                self._publish()
        if not self._told.wait(max(0.0, deadline - time.monotonic())) and self._give_up is not None:
            self._give_up(error)

    def _change(self, **fields: Any) -> None:
        with self._lock:  # both threads change the heartbeat
            self._heartbeat = replace(self._heartbeat, **fields)

    def _publish(self) -> None:
        reached, since = self._reached(), time.monotonic() - self._began
        self._change(beat=self._heartbeat.beat + 1, reached=reached, since=since)
        self._store.set(_key(self._rank), json.dumps(asdict(self._heartbeat)))

    def _reached(self) -> int:
        """How far the accelerator has come. If it cannot say, it has failed, and this rank with it."""
        try:
            return 0 if self.queue is None else self.queue.reached()
        except RuntimeError as error:
            said = str(error).splitlines()[0]
            self._diagnosis = self._diagnosis or Diagnosis(
                self._rank, self.where, f"its device failed: {said}"
            )
            return self._heartbeat.reached

    def _read(self) -> dict[int, Heartbeat]:
        values = self._store.multi_get([_key(rank) for rank in range(self._size)])
        heartbeats = [Heartbeat(**json.loads(value)) for value in values]
        return {
            rank: replace(heartbeat, state=State(heartbeat.state))
            for rank, heartbeat in enumerate(heartbeats)
        }

    def _notice(self, heartbeats: Mapping[int, Heartbeat]) -> None:
        now = time.monotonic()
        for rank, heartbeat in heartbeats.items():
            before = self._seen.get(rank)
            if before is None or heartbeat.beat != before.beat:
                self._beaten[rank] = now
            if before is None or heartbeat.progress != before.progress:
                self._moved[rank] = now
        self._seen = dict(heartbeats)
        still = {rank: Still(now - self._beaten[rank], now - self._moved[rank]) for rank in heartbeats}
        wait = Wait(self._waited, self._broken)
        diagnosis = diagnose(self._rank, self._heartbeat, wait, heartbeats, still, self._bounds)
        if diagnosis is not None:  # a rank may have told why it ends since, and be gone now
            diagnosis = (
                diagnose(self._rank, self._heartbeat, wait, self._read(), still, self._bounds) or diagnosis
            )
        self._diagnosis = diagnosis

    def _lose_store(self, error: RuntimeError) -> None:
        """The store lives in the first rank, or in its launcher: one of them is gone or has stopped."""
        first = self._seen.get(0)
        if self._rank != 0 and first is not None and first.state is State.RUNNING:
            reason = "it died" if is_gone(first, self._heartbeat) else "it shows no sign of life"
            said = str(error).splitlines()[0]
            self._diagnosis = Diagnosis(0, self.where, f"{reason}, or the store beside it is gone ({said})")
        else:
            self._diagnosis = Diagnosis(None, self.where, f"the ranks' store is gone: {error}")


def _nothing() -> None:
    pass


def _key(rank: int) -> str:
    return f"heartbeat/{rank}"
