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
from runtime.parallel.meeting import MEETING, in_background
from runtime.parallel.signs import Bounds, Sign, State, Still, Verdict, Wait, ending, is_gone, judge, own_sign

log = logging.getLogger(__name__)

_TICKS = 10  # signs within one timeout, and at least one a second
_PATIENCE = 0.8  # part of the timeout after which silence is a failure; the rest is for telling everybody
_GRACE = 20.0  # seconds, at most, in which the main thread should hear a verdict; agents kill after 30


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
        self._sign, self._began = own_sign(), time.monotonic()
        self._lock = threading.Lock()
        self._verdict: Verdict | None = None
        self._told = threading.Event()  # the main thread knows the verdict, or this rank has ended by itself
        self._wake, self._closed = threading.Event(), threading.Event()
        self._waited, self._broken = 0.0, False
        self._seen: dict[int, Sign] = {}
        self._beaten: dict[int, float] = {}  # rank → when its beat was seen to change
        self._moved: dict[int, float] = {}  # and when its progress was
        self._swept = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="lockstep-watch", daemon=True)

    def start(self) -> None:
        """Show the first sign and begin to look at the others', once they have all shown theirs."""
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
        return self._sign.where

    def at(self, where: str, *, busy: bool = False) -> None:
        """Say what this rank is doing, and whether it is something that others may wait long for."""
        self._began = time.monotonic()
        self._change(where=where, busy=busy)
        self._wake.set()

    @contextlib.contextmanager
    def busy(self, where: str) -> Iterator[None]:
        """While the block runs, this rank is at something that others may wait long for; then at what it was
        before. If the block fails, it failed there."""
        before = self._sign
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
        self._change(entered=self._sign.entered + 1)

    def check(self, waited: float) -> None:
        """Raise if waiting is in vain; called during a wait of `waited` seconds so far.

        Raises:
            RankFailedError: a rank is dead, stalled or has failed.
            CancelledError: a rank was cancelled.
        """
        self._waited, self._began = waited, time.monotonic()
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
        self._change(**ending(error, self._rank))
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
        if sign is not None and sign.host == self._sign.host and not is_gone(sign, self._sign):
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
            if all(signs[r].state is not State.RUNNING or is_gone(signs[r], self._sign) for r in others):
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
                if self._verdict is None and time.monotonic() - self._swept >= self._tick:
                    self._notice(self._read())
                    self._swept = time.monotonic()
            except RuntimeError as error:
                self._lose_store(error)
        self._act(self._verdict.error())

    def _act(self, error: LockstepError) -> None:
        """The main thread hears of `error` when it asks next; help it there, or give it up."""
        try:
            self.abort()
        except RuntimeError as trouble:
            log.warning("what the device waits for could not be ended: %s", trouble)
        deadline = time.monotonic() + min(self.timeout, _GRACE)
        if not self._told.is_set():  # from now on it shows no more signs, and must not be taken for the cause
            self._change(**ending(error, self._rank))
            with contextlib.suppress(RuntimeError):  # the store may be what is gone
                self._publish()
        if not self._told.wait(max(0.0, deadline - time.monotonic())) and self._give_up is not None:
            self._give_up(error)

    def _change(self, **fields: Any) -> None:
        with self._lock:  # both threads change the sign
            self._sign = replace(self._sign, **fields)

    def _publish(self) -> None:
        reached, since = self._reached(), time.monotonic() - self._began
        self._change(beat=self._sign.beat + 1, reached=reached, since=since)
        self._store.set(_key(self._rank), json.dumps(asdict(self._sign)))

    def _reached(self) -> int:
        """How far the accelerator has come. If it cannot say, it has failed, and this rank with it."""
        try:
            return 0 if self.queue is None else self.queue.reached()
        except RuntimeError as error:
            said = str(error).splitlines()[0]
            self._verdict = self._verdict or Verdict(self._rank, self.where, f"its device failed: {said}")
            return self._sign.reached

    def _read(self) -> dict[int, Sign]:
        values = self._store.multi_get([_key(rank) for rank in range(self._size)])
        signs = [Sign(**json.loads(value)) for value in values]
        return {rank: replace(sign, state=State(sign.state)) for rank, sign in enumerate(signs)}

    def _notice(self, signs: Mapping[int, Sign]) -> None:
        now = time.monotonic()
        for rank, sign in signs.items():
            before = self._seen.get(rank)
            if before is None or sign.beat != before.beat:
                self._beaten[rank] = now
            if before is None or sign.progress != before.progress:
                self._moved[rank] = now
        self._seen = dict(signs)
        still = {rank: Still(now - self._beaten[rank], now - self._moved[rank]) for rank in signs}
        wait = Wait(self._waited, self._broken)
        verdict = judge(self._rank, self._sign, wait, signs, still, self._bounds)
        if verdict is not None:  # a rank may have told why it ends since, and be gone now
            verdict = judge(self._rank, self._sign, wait, self._read(), still, self._bounds) or verdict
        self._verdict = verdict

    def _lose_store(self, error: RuntimeError) -> None:
        """The store lives in the first rank, or in its launcher: one of them is gone or has stopped."""
        first = self._seen.get(0)
        if self._rank != 0 and first is not None and first.state is State.RUNNING:
            reason = "it died" if is_gone(first, self._sign) else "it shows no sign of life"
            said = str(error).splitlines()[0]
            self._verdict = Verdict(0, self.where, f"{reason}, or the store beside it is gone ({said})")
        else:
            self._verdict = Verdict(None, self.where, f"the ranks' store is gone: {error}")


def _nothing() -> None:
    pass


def _key(rank: int) -> str:
    return f"sign/{rank}"
