"""The meeting: how the ranks of one job find each other's store, and what ends their waiting for each other.

What torch does here blocks in C++, deaf to signals and to time, so a thread does it and the caller waits.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Generic, Self, TypeVar

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from runtime.errors import BadRequestError, LockstepError, RankFailedError

MEETING = "the meeting of the ranks"

_GLANCE = 0.05  # seconds between two looks at what a thread does
_RETRY = 0.2  # seconds between two tries to reach the store
_TRY = 2.0  # seconds that one try may take
_FAREWELL = 1.0  # seconds that the store's host stays, so that others can read why it leaves
_OFF = "off"

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """Where ranks meet.

    Attributes:
        rank, world: which of how many.
        local_rank: its number on its node.
        host, port: of the store that they share.
        hosted: whether whoever started the ranks holds the store; otherwise the first rank does.
        attempt: tells one start of the ranks from another with the same store.
    """

    rank: int
    world: int
    local_rank: int
    host: str
    port: int
    hosted: bool = False
    attempt: str = "0"

    @classmethod
    def from_environment(cls) -> Self:
        """As torchrun sets it.

        Raises:
            BadRequestError: a variable means nothing, or is missing: torchrun did not start this process.
        """
        missing = [name for name in _VARIABLES if not os.environ.get(name)]
        if missing:
            raise BadRequestError(f"{', '.join(missing)}: missing; start this with torchrun")
        world = _number("WORLD_SIZE", 1, 2**20)
        return cls(
            rank=_number("RANK", 0, world - 1),
            world=world,
            local_rank=_number("LOCAL_RANK", 0, world - 1),
            host=os.environ["MASTER_ADDR"].removeprefix("[").removesuffix("]"),
            port=_number("MASTER_PORT", 1, 2**16 - 1),
            hosted=os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            attempt=os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"),
        )

    @classmethod
    def at(cls, address: str, port: int, *, rank: int, world: int, local_rank: int | None = None) -> Self:
        """At a port that rank 0 opens on `address`."""
        return cls(rank, world, rank if local_rank is None else local_rank, address, port)

    @property
    def address(self) -> str:
        """The store's, as people write it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def _number(name: str, least: int, most: int) -> int:
    """The number in an environment variable."""
    text = os.environ[name]
    if not text.isdecimal() or not text.isascii() or not least <= int(text) <= most:
        raise BadRequestError(
            f"{name}: {text!r} given; it must be a whole number from {least} to {most}, as torchrun sets it"
        )
    return int(text)


class Background(Generic[_T]):
    """A call that blocks in C++, made by a thread, which ends with the process at the latest."""

    def __init__(self, call: Callable[[], _T]):
        self._call, self._done = call, threading.Event()
        self._result: list[_T] = []
        self._error: BaseException | None = None
        threading.Thread(target=self._run, name="lockstep-background", daemon=True).start()

    def _run(self) -> None:
        try:
            self._result.append(self._call())
        except BaseException as error:  # raised again where it is waited for
            self._error = error
        self._done.set()

    def ended(self, within: float) -> bool:
        """Wait so long at most; interrupted by signals. Whether the call has returned or raised."""
        return self._done.wait(within)

    def result(self) -> _T:
        """What an ended call returned; raises what it raised."""
        if self._error is not None:
            raise self._error
        return self._result[0]


def in_background(call: Callable[[], _T], check: Callable[[float], None]) -> _T:
    """The result of a call that blocks in C++; `check` is asked meanwhile and may raise to end the wait."""
    running, started = Background(call), time.monotonic()
    while not running.ended(_GLANCE):
        check(time.monotonic() - started)
    return running.result()


def meet(rendezvous: Rendezvous, timeout: float) -> Store:
    """The store that the ranks share, once all of them are there.

    Raises:
        BadRequestError: another rank refuses what it was given.
        RankFailedError: the store was not reached, or a rank did not come, within `timeout` seconds.
    """
    running = Background(lambda: _meet(rendezvous, timeout))
    deadline = time.monotonic() + timeout + _TRY + _FAREWELL
    try:
        while not running.ended(_GLANCE):
            if time.monotonic() > deadline:
                raise _unreached(rendezvous, timeout, "what answers there is no store of torch")
    except KeyboardInterrupt:
        # A launcher that sees a rank refuse interrupts the others, who are about to read why.
        if running.ended(_TRY / 4):
            running.result()
        raise
    return running.result()


def leave(rendezvous: Rendezvous, error: Exception) -> None:
    """Tell the ranks that are meeting that this one will not come, and why; a try, and a short one."""
    if rendezvous.rank == 0 and not rendezvous.hosted:
        return  # nobody can reach a store that was never there

    def tell() -> None:
        store = _shared(rendezvous, _reach(rendezvous, _TRY))
        refused = isinstance(error, BadRequestError)
        reason = str(error) if refused else f"{type(error).__name__}: {error}"
        _write_off(store, rendezvous.rank, reason, refused=refused, told=True)

    with suppress(RankFailedError, RuntimeError):
        running = Background(tell)
        if running.ended(2 * _TRY):
            running.result()


def _meet(rendezvous: Rendezvous, timeout: float) -> Store:
    hosts = rendezvous.rank == 0 and not rendezvous.hosted
    deadline = time.monotonic() + timeout
    store = _shared(rendezvous, _open(rendezvous) if hosts else _reach(rendezvous, timeout))
    try:
        missing = _await_all(rendezvous, store, deadline)
        if not missing:
            return store
        reason = (
            f"it did not come to {rendezvous.address} within {timeout:.0f} s; "
            f"{rendezvous.world - len(missing)} of {rendezvous.world} ranks are there "
            "(a longer --timeout waits longer)"
        )
        _write_off(store, min(missing), reason)
    except RuntimeError as error:
        said = str(error).splitlines()[0]
        raise RankFailedError(0, MEETING, f"the store at {rendezvous.address} is gone: {said}") from None
    if hosts:
        time.sleep(_FAREWELL)
    raise RankFailedError(min(missing), MEETING, reason)


def _await_all(rendezvous: Rendezvous, store: Store, deadline: float) -> set[int]:
    """Wait until all ranks are there; those that are not when the time is over.

    Raises:
        BadRequestError, RankFailedError: there will be no meeting.
    """
    store.set(_here(rendezvous.rank), "")
    missing = set(range(rendezvous.world))
    while True:
        missing = {rank for rank in missing if not store.check([_here(rank)])}
        if store.check([_OFF]):
            raise _read_off(store)
        if not missing or time.monotonic() > deadline:
            return missing
        time.sleep(_GLANCE)


def _write_off(store: Store, rank: int, reason: str, *, refused: bool = False, told: bool = False) -> None:
    """There will be no meeting, for this reason; `told` by that rank itself."""
    store.set(_OFF, json.dumps({"rank": rank, "reason": reason, "refused": refused, "told": told}))


def _read_off(store: Store) -> LockstepError:
    """Why there will be no meeting."""
    told = json.loads(store.get(_OFF))
    if told["refused"]:
        return BadRequestError(f"rank {told['rank']} refuses: {told['reason']}")
    return RankFailedError(told["rank"], MEETING, told["reason"], told["told"])


def _open(rendezvous: Rendezvous) -> Store:
    """The store, in this process. Whatever the address, this process reaches it on its own machine."""
    try:
        return TCPStore(
            "localhost",
            rendezvous.port,
            rendezvous.world,
            True,
            timedelta(seconds=_TRY),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except RuntimeError as error:
        said = str(error).splitlines()[0]
        raise RankFailedError(
            0, MEETING, f"port {rendezvous.port} (MASTER_PORT) cannot be opened: {said}"
        ) from None


def _reach(rendezvous: Rendezvous, timeout: float) -> Store:
    """The store that another process holds. It is asked for politely first: torch's own tries are loud."""
    deadline, said = time.monotonic() + timeout, ""
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((rendezvous.host, rendezvous.port), timeout=_TRY):
                pass
            return TCPStore(
                rendezvous.host,
                rendezvous.port,
                rendezvous.world,
                False,
                timedelta(seconds=_TRY),
                wait_for_workers=False,
            )
        except (OSError, RuntimeError, UnicodeError) as error:
            said = str(error).splitlines()[0]
            time.sleep(_RETRY)
    raise _unreached(rendezvous, timeout, said)


def _unreached(rendezvous: Rendezvous, timeout: float, said: str) -> RankFailedError:
    reason = (
        f"rank {rendezvous.rank} found no store at {rendezvous.address} within {timeout:.0f} s ({said}); "
        "rank 0 does not run, or the address is wrong: --master-addr and --master-port of torchrun, "
        "MASTER_ADDR and MASTER_PORT"
    )
    return RankFailedError(0, MEETING, reason)


def _shared(rendezvous: Rendezvous, store: Store) -> Store:
    return PrefixStore(f"lockstep/{rendezvous.attempt}", store)


def _here(rank: int) -> str:
    return f"here/{rank}"
