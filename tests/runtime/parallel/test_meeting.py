"""Ranks that meet: within the timeout all are there, or it is known who is not and why; signals are heard."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace

import pytest

from runtime.errors import BadRequestError, LockstepError, RankFailedError
from runtime.parallel.meeting import Rendezvous, leave, meet
from tests.ranks import free_port

TIMEOUT = 2.0  # seconds
SLACK = 8.0  # seconds that a busy machine may add


@contextmanager
def in_time() -> Iterator[None]:
    started = time.monotonic()
    yield
    assert time.monotonic() - started < TIMEOUT + SLACK


def at(rank: int, world: int, port: int | None = None, host: str = "127.0.0.1") -> Rendezvous:
    return Rendezvous.at(host, port or free_port(), rank=rank, world=world)


def outcomes(*meeting: Rendezvous) -> list[LockstepError | None]:
    """How each of several ranks fares that meet at once."""
    found: list[LockstepError | None] = [None] * len(meeting)
    stores = []  # of which one may hold the others'

    def come(number: int) -> None:
        try:
            stores.append(meet(meeting[number], TIMEOUT))
        except LockstepError as error:
            found[number] = error

    threads = [threading.Thread(target=come, args=(number,)) for number in range(len(meeting))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_ranks_meet(host: str) -> None:
    port = free_port()
    assert outcomes(at(0, 2, port, host), at(1, 2, port, host)) == [None, None]


def test_a_rank_that_waits_alone_says_who_is_missing() -> None:
    with (
        in_time(),
        pytest.raises(RankFailedError, match=r"it did not arrive at 127.0.0.1:\d+ within 2 s") as caught,
    ):
        meet(at(0, 3), TIMEOUT)
    assert caught.value.rank == 1
    assert "1 of 3 ranks are there" in str(caught.value)


def test_all_name_the_one_that_is_missing() -> None:
    port = free_port()
    with in_time():
        found = outcomes(at(0, 3, port), at(2, 3, port))
    for error in found:
        assert isinstance(error, RankFailedError) and error.rank == 1, found


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "no-such-host.invalid"])
def test_where_no_store_is_the_address_is_named(host: str) -> None:
    rendezvous = at(1, 2, host=host)
    with in_time(), pytest.raises(RankFailedError, match="found no store at") as caught:
        meet(rendezvous, TIMEOUT)
    assert rendezvous.address in str(caught.value) and "MASTER_ADDR" in str(caught.value)
    assert rendezvous.address == (f"[{host}]" if ":" in host else host) + f":{rendezvous.port}"


def test_who_answers_and_is_no_store_is_not_waited_for() -> None:
    mute = socket.create_server(("127.0.0.1", 0))
    with closing(mute), in_time(), pytest.raises(RankFailedError, match="found no store at"):
        meet(at(1, 2, mute.getsockname()[1]), TIMEOUT)


def test_a_port_that_is_taken_is_named() -> None:
    with closing(socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)) as taken:
        port = taken.getsockname()[1]
        with in_time(), pytest.raises(RankFailedError, match=f"port {port} .* cannot be opened"):
            meet(at(0, 2, port), TIMEOUT)


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (BadRequestError("config: missing"), BadRequestError, "rank 1 refuses: config: missing"),
        (OSError("disk"), RankFailedError, "rank 1 failed at the meeting of the ranks: OSError: disk"),
    ],
)
def test_a_rank_that_does_not_come_tells_the_others_why(
    error: Exception, kind: type[LockstepError], said: str
) -> None:
    port = free_port()
    telling = threading.Thread(target=leave, args=(at(1, 3, port), error))
    telling.start()
    with in_time():
        found = outcomes(at(0, 3, port), at(2, 3, port))
    telling.join()
    assert [(type(one), str(one)) for one in found] == [(kind, said)] * 2


def test_a_former_start_of_the_same_ranks_is_not_remembered() -> None:
    """An agent that starts ranks again holds the same store."""
    port = free_port()
    holder = at(0, 1, port)
    store = meet(holder, TIMEOUT)
    first = replace(at(1, 2, port), hosted=True, attempt="1")
    leave(first, BadRequestError("config: missing"))
    again = [replace(at(rank, 2, port), hosted=True, attempt="2") for rank in range(2)]
    assert outcomes(*again) == [None, None]
    assert outcomes(replace(first, rank=0))[0] is not None
    del store


def test_signals_are_heard_while_ranks_are_waited_for() -> None:
    timer = threading.Timer(0.5, os.kill, args=(os.getpid(), signal.SIGINT))
    timer.start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        meet(at(0, 2), 60.0)
    assert time.monotonic() - started < SLACK


GIVEN = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "[fe80::1]",
    "MASTER_PORT": "29500",
}


def test_what_torchrun_sets_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in GIVEN.items():
        monkeypatch.setenv(name, value)
    assert Rendezvous.from_environment() == Rendezvous(1, 2, 0, "fe80::1", 29500)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("RANK", "x", "RANK: 'x' given; it must be a whole number from 0 to 1"),
        ("RANK", "5", "RANK: '5' given; it must be a whole number from 0 to 1"),
        ("WORLD_SIZE", "0", "WORLD_SIZE: '0' given"),
        ("WORLD_SIZE", "-2", "WORLD_SIZE: '-2' given"),
        ("LOCAL_RANK", "²", "LOCAL_RANK: '²' given"),
        ("MASTER_PORT", "abc", "MASTER_PORT: 'abc' given; it must be a whole number from 1 to 65535"),
        ("MASTER_PORT", "99999", "MASTER_PORT: '99999' given"),
        ("MASTER_ADDR", "", "MASTER_ADDR: missing; start this with torchrun"),
    ],
)
def test_variables_that_mean_nothing_are_named_with_their_value(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str
) -> None:
    for other, given in {**GIVEN, name: value}.items():
        monkeypatch.setenv(other, given)
    with pytest.raises(BadRequestError) as caught:
        Rendezvous.from_environment()
    assert said in str(caught.value)
