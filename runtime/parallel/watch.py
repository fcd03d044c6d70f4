"""Watch: every rank publishes heartbeats in a shared store and reads the others', so that no rank waits for
one that has failed.

A thread publishes this rank's heartbeat a few times within the timeout and reads the others'. The main thread
asks for the diagnosis whenever it waits for other ranks, so a dead, stalled, failed or cancelled rank ends
the wait of all of them, with one error that names it.
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
from functools import partial
from typing import Any, NoReturn, Protocol, TypeVar

from torch.distributed import Store  # type: ignore[attr-defined]

from runtime.errors import LockstepError, RankFailedError, reason
from runtime.parallel.heartbeats import (
    Bounds,
    Diagnosis,
    Heartbeat,
    RankState,
    Still,
    Wait,
    diagnose,
    ending,
    is_gone,
    machine_of,
    own_heartbeat,
)
from runtime.parallel.meeting import MEETING, Background, in_background

log = logging.getLogger(__name__)

_T = TypeVar("_T")
_TICKS = 10  # heartbeats within one timeout, and at least one a second
_PATIENCE = 0.8  # part of the timeout after which silence is a failure; the rest is for telling all ranks
_TRANSFER = 4  # multiples of the patience within which a transfer that all have started must get further
_ANSWER = 10.0  # seconds for the store to answer a rank that leaves
_GRACE = 20.0  # limit in seconds until the main thread takes a diagnosis; agents kill after 30


class Queue(Protocol):
    """Work queue of an accelerator."""

    def mark(self) -> None:
        """Mark the queue's end, where a transfer that others wait for begins."""
        ...

    def reached(self) -> int:
        """Number of marks that the accelerator has reached; called from another thread."""
        ...


class Watch:
    """Watches over the ranks of one job, from one of them.

    Args:
        store: store that all ranks share, through a connection of the watch's own.
        rank, size: number of this rank, and of ranks.
        timeout: seconds within which a failure anywhere ends every wait here.
        busy: limit in seconds for a single activity of a rank that may take long.
        place: address of the store, for messages.
        give_up: called with the error if the main thread has not noticed it within another `timeout`, at most
            20 s, because it is stuck where it cannot ask. None leaves it there.

    Attributes:
        before_transfer: raises if this rank must not start a transfer.
        queue: work queue of this rank's accelerator, if ranks wait for each other there.
        abort: aborts the transfers that the accelerator waits for; called from the watch's thread.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        timeout: float,
        give_up: Callable[[LockstepError], None] | None = None,
        busy: float = math.inf,
        place: str = "",
    ):
        self.timeout = timeout
        self.before_transfer: Callable[[], None] = _nothing
        self.abort: Callable[[], None] = _nothing
        self.queue: Queue | None = None
        self._store, self._rank, self._size = store, rank, size
        self._place = f" at {place}" if place else ""
        self._bounds, self._tick = Bounds(_PATIENCE * timeout, busy), min(1.0, timeout / _TICKS)
        store.set_timeout(timedelta(seconds=self._bounds.patience))
        self._give_up = give_up
        self._heartbeat, self._began = own_heartbeat(), time.monotonic()
        self._lock, self._publishing = threading.Lock(), threading.Lock()
        self._diagnosis: Diagnosis | None = None
        self._told = (
            threading.Event()
        )  # the main thread knows the diagnosis, or this rank has ended by itself
        self._wake, self._closed = threading.Event(), threading.Event()
        self._waited, self._broken = 0.0, False
        self._connects: float | None = None  # limit in seconds, while ranks connect to each other
        self._mute = False  # whether the store is out of reach
        self._seen: dict[int, Heartbeat] = {}
        self._beaten: dict[int, float] = {}  # rank → time of its last heartbeat
        self._moved: dict[int, float] = {}  # rank → time of its last progress
        self._swept = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="lockstep-watch", daemon=True)

    def start(self) -> None:
        """Publish the first heartbeat, wait for every rank's, and start to watch them."""
        self._publish()
        keys = [_key(rank) for rank in range(self._size)]
        try:
            wait = partial(self._store.wait, keys, timedelta(seconds=self.timeout))
            in_background(wait, self._check_start)
        except RuntimeError as error:
            raise RankFailedError(
                None, MEETING, f"a rank connected and then showed no sign of life ({reason(error)})"
            ) from None
        self._swept = time.monotonic()
        self._thread.start()

    def _check_start(self, waited: float) -> None:
        if waited > 2 * self.timeout:  # the store limits this wait, if it answers
            raise RankFailedError(None, MEETING, f"the ranks' store{self._place} does not answer any more")

    @property
    def where(self) -> str:
        """Current activity of this rank."""
        return self._heartbeat.where

    def at(self, where: str, *, busy: bool = False) -> None:
        """Set this rank's current activity, and whether it may take long while others wait."""
        self._began = time.monotonic()
        self._change(where=where, busy=busy)
        self._wake.set()

    @contextlib.contextmanager
    def busy(self, where: str) -> Iterator[None]:
        """Set this rank's activity to one that may take long, and back to the former after the block.

        If the block raises, the activity stays, so that the error names it.
        """
        before = self._heartbeat
        self.at(where, busy=True)
        yield
        self.at(before.where, busy=before.busy)

    def enter(self) -> None:
        """Note that this rank starts a transfer of tensors."""
        self.before_transfer()
        self.count()
        if self.queue is not None:
            self.queue.mark()

    def count(self) -> None:
        """Note that this rank starts a transfer of any kind."""
        self._waited, self._began = 0.0, time.monotonic()
        self._change(entered=self._heartbeat.entered + 1)

    @contextlib.contextmanager
    def connecting(self, within: float | None = None) -> Iterator[None]:
        """Mark the block as one in which all ranks connect to each other.

        Args:
            within: seconds that this may take once all have come; by default as long as a rank may be silent.
        """
        self.count()
        self._connects = self._bounds.patience if within is None else within
        try:
            yield
        finally:
            self._connects = None

    def check(self, waited: float) -> None:
        """Raise if a wait, of `waited` seconds so far, cannot succeed.

        Raises:
            RankFailedError: a rank has died, stalled or failed.
            CancelledError: a rank was cancelled.
        """
        self._waited, self._began = waited, time.monotonic()
        silent = time.monotonic() - self._swept
        if self._diagnosis is None and silent > 2 * self.timeout:
            self._diagnosis = self._silent_store(silent)
        self._raise_diagnosis()

    def _silent_store(self, silent: float) -> Diagnosis:
        """Diagnose a store that has not answered for so long; the first rank, or its launcher, holds it."""
        self._mute = True
        said = f"the ranks' store{self._place} has not answered for {silent:.0f} s"
        first = self._seen.get(0)
        if first is None or first.host == self._heartbeat.host:
            return Diagnosis(None, self.where, said)
        host = machine_of(0, self._seen)
        said += f": {host} is down, or the network to it is cut"
        return Diagnosis(0, self.where, said, host=host)

    def blame(self, error: Exception) -> NoReturn:
        """Raise an error for a broken transfer, naming the rank that caused it once it is known.

        Raises:
            RankFailedError: always, unless a rank was cancelled.
            CancelledError: a rank was cancelled.
        """
        self._broken = True
        deadline = time.monotonic() + self.timeout
        while time.monotonic() < deadline:
            self._raise_diagnosis()
            time.sleep(self._tick / 4)
        self._told.set()
        broke = "a transfer between ranks broke" if self._connects is None else "the ranks cannot connect"
        raise RankFailedError(None, self.where, f"{broke}: {reason(error)}") from error

    def failure(self) -> LockstepError | None:
        """Read the heartbeats now; return the error that another rank's failure causes here, if any."""
        if self._diagnosis is None:
            try:
                heartbeats = self._ask(self._read)
                if heartbeats is not None:
                    self._notice(heartbeats)
            except RuntimeError as error:
                self._lose_store(error)
        return None if self._diagnosis is None or self._diagnosis.cancelled else self._diagnosis.error()

    def end(self, error: BaseException | None = None) -> None:
        """Leave the watch, telling the other ranks that this one is done or ends because of `error`."""
        self._told.set()
        self._change(**ending(error, self._rank))
        if self._mute:  # a call to the store might never return
            self._closed.set()
            return
        try:
            if self._ask(self._told_end) is None:
                log.warning("could not tell the other ranks how this one ended: the store does not answer")
        except RuntimeError:
            log.warning("could not tell the other ranks how this one ended: the store is gone")
        if self._diagnosis is not None and self._diagnosis.silent:
            self._fence(self._diagnosis.rank)
        self._closed.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(min(self.timeout, _ANSWER))

    def _told_end(self) -> bool:
        self._publish()
        return True

    def _ask(self, call: Callable[[], _T]) -> _T | None:
        """Make a call to the store; None if it does not answer in time, as when the network to it is cut."""
        asked = Background(call)
        return asked.result() if asked.ended(min(self.timeout, _ANSWER)) else None

    def _fence(self, rank: int | None) -> None:
        """Kill a silent process on this host: should it ever wake up, it must do no harm."""
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
        """Wait until every other rank has ended or died, as the rank that hosts the store must."""
        deadline = time.monotonic() + self.timeout
        others = [rank for rank in range(self._size) if rank != self._rank]
        while time.monotonic() < deadline:
            try:
                heartbeats = self._ask(self._read)
            except RuntimeError:
                return
            if heartbeats is None or all(
                heartbeats[r].state is not RankState.RUNNING or is_gone(heartbeats[r], self._heartbeat)
                for r in others
            ):
                return
            time.sleep(self._tick / 4)

    def _raise_diagnosis(self) -> None:
        if self._diagnosis is not None:
            self._told.set()
            raise self._diagnosis.error()

    def _run(self) -> None:
        """Publish at every tick and every change; read the others' heartbeats at every tick."""
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
        """Bring `error` to the main thread, which takes it when it asks next, or give it up."""
        try:
            self.abort()
        except RuntimeError as trouble:
            log.warning("the device's transfers could not be aborted: %s", trouble)
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
        with self._publishing:  # or an older heartbeat of one thread could replace how this rank ended
            reached, since = self._reached(), time.monotonic() - self._began
            self._change(beat=self._heartbeat.beat + 1, reached=reached, since=since)
            self._store.set(_key(self._rank), json.dumps(asdict(self._heartbeat)))

    def _reached(self) -> int:
        """Number of marks that the accelerator has reached; if it raises, this rank has failed."""
        try:
            return 0 if self.queue is None else self.queue.reached()
        except RuntimeError as error:
            self._diagnosis = self._diagnosis or Diagnosis(
                self._rank, self.where, f"its device failed: {reason(error)}"
            )
            return self._heartbeat.reached

    def _read(self) -> dict[int, Heartbeat]:
        values = self._store.multi_get([_key(rank) for rank in range(self._size)])
        heartbeats = [Heartbeat(**json.loads(value)) for value in values]
        return {
            rank: replace(heartbeat, state=RankState(heartbeat.state))
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
        bounds = self._bounds._replace(transfer=self._longest)
        diagnosis = diagnose(self._rank, self._heartbeat, wait, heartbeats, still, bounds)
        if diagnosis is not None:  # the rank may have published a reason since
            diagnosis = diagnose(self._rank, self._heartbeat, wait, self._read(), still, bounds) or diagnosis
        self._diagnosis = diagnosis

    @property
    def _longest(self) -> float:
        """Limit in seconds of a transfer in which no rank makes progress; none for those of an accelerator,
        whose queue may hold long computations, and which NCCL limits by itself."""
        if self._connects is not None:
            return self._connects
        return _TRANSFER * self._bounds.patience if self.queue is None else math.inf

    def _lose_store(self, error: RuntimeError) -> None:
        """Diagnose a lost store: its host, the first rank or its launcher, has died or stopped."""
        first = self._seen.get(0)
        if self._rank != 0 and first is not None and first.state is RankState.RUNNING:
            how = "it died" if is_gone(first, self._heartbeat) else "it shows no sign of life"
            said = f"{how}, or the store beside it is gone ({reason(error)})"
            self._diagnosis = Diagnosis(0, self.where, said, host=machine_of(0, self._seen))
        else:
            self._diagnosis = Diagnosis(None, self.where, f"the ranks' store is gone: {reason(error)}")


def _nothing() -> None:
    pass


def _key(rank: int) -> str:
    return f"heartbeat/{rank}"
