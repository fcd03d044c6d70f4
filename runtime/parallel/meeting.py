"""Meeting: how the ranks of one job find their shared store, and what ends their wait for each other.

torch's calls block in C++ and ignore signals and time limits, so a thread makes them and the caller waits.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Generic, NamedTuple, Self, TypeVar

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from runtime.errors import BadRequestError, LockstepError, RankFailedError, in_words, reason
from runtime.parallel.heartbeats import host_name
from runtime.parallel.network import Place, source_towards

MEETING = "the meeting of the ranks"

_GLANCE = 0.05  # seconds between two polls of a thread
_RETRY = 0.2  # seconds between two attempts to reach the store
_TRY = 2.0  # seconds that one attempt may take
_FAREWELL = 1.0  # seconds that the store's host stays, so that others can read why it leaves
_OFF = "off"

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """Place where ranks meet.

    Attributes:
        rank, world: number of this rank, and of ranks.
        local_rank: number of this rank on its node.
        host, port: address of the shared store.
        hosted: whether the launcher of the ranks hosts the store; otherwise the first rank does.
        attempt: distinguishes several starts of the ranks with the same store.
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
        """Read the rendezvous from the variables that torchrun sets.

        Raises:
            BadRequestError: a variable is invalid or missing: torchrun did not start this process.
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
        """Make a rendezvous at a port that rank 0 opens on `address`."""
        return cls(rank, world, rank if local_rank is None else local_rank, address, port)

    @property
    def address(self) -> str:
        """Address of the store, as people write it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Meeting(NamedTuple):
    """What a rank knows once all have met.

    Attributes:
        store: store that the ranks share.
        places: where every rank runs.
    """

    store: Store
    places: list[Place]


def _number(name: str, least: int, most: int) -> int:
    """Parse the number in an environment variable."""
    text = os.environ[name]
    if not text.isdecimal() or not text.isascii() or not least <= int(text) <= most:
        raise BadRequestError(
            f"{name}: {text!r} given; it must be a whole number from {least} to {most}, as torchrun sets it"
        )
    return int(text)


class Background(Generic[_T]):
    """A call that blocks in C++, run by a daemon thread."""

    def __init__(self, call: Callable[[], _T]):
        self._call, self._done = call, threading.Event()
        self._result: list[_T] = []
        self._error: BaseException | None = None
        threading.Thread(target=self._run, name="lockstep-background", daemon=True).start()

    def _run(self) -> None:
        try:
            self._result.append(self._call())
        except BaseException as error:  # raised again by `result`
            self._error = error
        self._done.set()

    def ended(self, within: float) -> bool:
        """Wait for at most `within` seconds, or a signal; return whether the call has ended."""
        return self._done.wait(within)

    def result(self) -> _T:
        """Return what the ended call returned, or raise what it raised."""
        if self._error is not None:
            raise self._error
        return self._result[0]


def in_background(call: Callable[[], _T], check: Callable[[float], None]) -> _T:
    """Run a call that blocks in C++ in a thread; `check` is called meanwhile, and raises to end the wait."""
    running, started = Background(call), time.monotonic()
    while not running.ended(_GLANCE):
        check(time.monotonic() - started)
    return running.result()


def meet(rendezvous: Rendezvous, timeout: float) -> Meeting:
    """Wait for all ranks, and return the store that they share and where they are.

    Raises:
        BadRequestError: another rank refuses its request.
        RankFailedError: the store was not reached, or a rank did not arrive, within `timeout` seconds.
    """
    running = Background(lambda: _meet(rendezvous, timeout))
    deadline = time.monotonic() + timeout + _TRY + _FAREWELL
    try:
        while not running.ended(_GLANCE):
            if time.monotonic() > deadline:
                raise _unreached(rendezvous, timeout, "the server at this address is not a torch store")
    except KeyboardInterrupt:
        # A launcher that sees a rank refuse interrupts the others, who are about to read why.
        if running.ended(_TRY / 4):
            running.result()
        raise
    return running.result()


def leave(rendezvous: Rendezvous, error: Exception) -> None:
    """Try, for a few seconds, to tell the ranks that are meeting that this one will not come, and why."""
    if rendezvous.rank == 0 and not rendezvous.hosted:
        return  # nobody can reach a store that was never there

    def tell() -> None:
        store = _shared(rendezvous, _reach(rendezvous, _TRY))
        refused = isinstance(error, BadRequestError)
        _write_off(store, rendezvous.rank, in_words(error), refused=refused, told=True)

    with suppress(RankFailedError, RuntimeError):
        running = Background(tell)
        if running.ended(2 * _TRY):
            running.result()


def _meet(rendezvous: Rendezvous, timeout: float) -> Meeting:
    hosts = rendezvous.rank == 0 and not rendezvous.hosted
    deadline = time.monotonic() + timeout
    store = _shared(rendezvous, _open(rendezvous, timeout) if hosts else _reach(rendezvous, timeout))
    try:
        missing = _await_all(rendezvous, store, deadline)
        if not missing:
            told = store.multi_get([_here(rank) for rank in range(rendezvous.world)])
            return Meeting(store, [Place(**json.loads(one)) for one in told])
        late = (
            f"it did not arrive at {rendezvous.address} within {timeout:.0f} s; "
            f"{rendezvous.world - len(missing)} of {rendezvous.world} ranks are there "
            "(a longer --timeout waits longer)"
        )
        _write_off(store, min(missing), late)
    except RuntimeError as error:
        raise RankFailedError(
            0, MEETING, f"the store at {rendezvous.address} is gone: {reason(error)}"
        ) from None
    if hosts:
        time.sleep(_FAREWELL)
    raise RankFailedError(min(missing), MEETING, late)


def _await_all(rendezvous: Rendezvous, store: Store, deadline: float) -> set[int]:
    """Wait for all ranks until the deadline; return the missing ones.

    Raises:
        BadRequestError, RankFailedError: a rank called the meeting off.
    """
    own = Place(host_name(), source_towards(rendezvous.host))
    store.set(_here(rendezvous.rank), json.dumps(asdict(own)))
    missing = set(range(rendezvous.world))
    while True:
        missing = {rank for rank in missing if not store.check([_here(rank)])}
        if store.check([_OFF]):
            raise _read_off(store)
        if not missing or time.monotonic() > deadline:
            return missing
        time.sleep(_GLANCE)


def _write_off(store: Store, rank: int, said: str, *, refused: bool = False, told: bool = False) -> None:
    """Call the meeting off because of `rank`; `told` if that rank itself explains it to the user."""
    store.set(_OFF, json.dumps({"rank": rank, "reason": said, "refused": refused, "told": told}))


def _read_off(store: Store) -> LockstepError:
    """Make the error that says why the meeting was called off."""
    told = json.loads(store.get(_OFF))
    if told["refused"]:
        return BadRequestError(f"rank {told['rank']} refuses: {told['reason']}")
    return RankFailedError(told["rank"], MEETING, told["reason"], told["told"])


def _open(rendezvous: Rendezvous, timeout: float) -> Store:
    """Host the store in this process, which reaches it locally, whatever its address.

    Even so, torch looks up the name of the address, which takes 10 s where no nameserver answers.
    """
    try:
        return TCPStore(
            "localhost",
            rendezvous.port,
            rendezvous.world,
            True,
            timedelta(seconds=timeout),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except RuntimeError as error:
        raise RankFailedError(
            0, MEETING, f"port {rendezvous.port} (MASTER_PORT) cannot be opened: {reason(error)}"
        ) from None


def _reach(rendezvous: Rendezvous, timeout: float) -> Store:
    """Connect to the store of another process; probe the port first, as torch logs its failed attempts."""
    deadline, said = time.monotonic() + timeout, ""
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((rendezvous.host, rendezvous.port), timeout=_TRY):
                pass
            left = max(_TRY, deadline - time.monotonic())  # torch looks up a name, see `_open`
            return TCPStore(
                rendezvous.host,
                rendezvous.port,
                rendezvous.world,
                False,
                timedelta(seconds=left),
                wait_for_workers=False,
            )
        except (OSError, RuntimeError, UnicodeError) as error:
            said = reason(error)
            time.sleep(_RETRY)
    raise _unreached(rendezvous, timeout, said)


def _unreached(rendezvous: Rendezvous, timeout: float, said: str) -> RankFailedError:
    problem = (
        f"rank {rendezvous.rank} found no store at {rendezvous.address} within {timeout:.0f} s ({said}); "
        "rank 0 is not running, or the address is wrong: --master-addr and --master-port of torchrun, "
        "MASTER_ADDR and MASTER_PORT"
    )
    return RankFailedError(0, MEETING, problem)


def _shared(rendezvous: Rendezvous, store: Store) -> Store:
    return PrefixStore(f"lockstep/{rendezvous.attempt}", store)


def _here(rank: int) -> str:
    return f"here/{rank}"
