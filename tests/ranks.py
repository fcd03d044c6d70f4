"""Real processes with gloo, for tests of what ranks do together, and of what they do when one fails."""

from __future__ import annotations

import contextlib
import ctypes
import math
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import torch

from launch.shell.exits import exit_code
from runtime.errors import RankFailedError
from runtime.parallel.meeting import Rendezvous
from runtime.parallel.ranks import Ranks, join

_PATIENT = 120.0  # seconds that a test of success waits
PROCESSES = multiprocessing.get_context("forkserver")  # forked from a process that has imported everything
PROCESSES.set_forkserver_preload(["tests.preloaded"])


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one rank ended.

    Attributes:
        code: exit code; negative for a signal; None if it had to be killed after the test.
        result: what its task returned.
        error: what it raised, as (type, rank, where, message).
        ended: when, on the machine's monotonic clock.
    """

    code: int | None
    result: Any = None
    error: tuple[str, int | None, str, str] | None = None
    ended: float = 0.0


def run_ranks(
    world: int,
    task: Callable[..., Any],
    *arguments: Any,
    hosts: Sequence[str] = (),
    timeout: float = _PATIENT,
    busy: float = math.inf,
) -> list[Any]:
    """Run `task(ranks, *arguments)` on `world` ranks, each on one thread; their results in rank order.

    Args:
        hosts: name of each rank's machine, as if they were on several.
    """
    outcomes = watch_ranks(world, task, *arguments, timeout=timeout, busy=busy, hosts=hosts)
    assert [o.code for o in outcomes] == [0] * world, [o.error or o.code for o in outcomes]
    return [o.result for o in outcomes]


def watch_ranks(
    world: int,
    task: Callable[..., Any],
    *arguments: Any,
    timeout: float,
    busy: float = math.inf,
    hosts: Sequence[str] = (),
) -> list[Outcome]:
    """As `run_ranks`, but ranks may fail; one that is still there long after the others is killed."""
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        processes = [
            PROCESSES.Process(
                target=_work,
                args=(
                    Rendezvous.at("127.0.0.1", port, rank=rank, world=world),
                    {"timeout": timeout, "busy": busy},
                    hosts[rank] if hosts else "",
                    Path(folder) / str(rank),
                    task,
                    arguments,
                ),
            )
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + 2 * timeout + 60
        codes: list[int | None] = [None] * world
        try:
            while time.monotonic() < deadline and sum(code is None for code in codes) > 0:
                codes = [process.exitcode for process in processes]
                time.sleep(0.02)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()
        return [_outcome(Path(folder) / str(rank), code) for rank, code in enumerate(codes)]


def free_port() -> int:
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def stop() -> None:
    """Stop this process as a debugger or a frozen machine would."""
    os.kill(os.getpid(), signal.SIGSTOP)


def die() -> None:
    """End this process as the kernel does when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)


def block() -> None:
    """Block in C, deaf to signals, as a call of a device's driver would: lock a mutex twice."""
    library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(256)
    library.pthread_mutex_init(mutex, None)
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)


def _work(
    rendezvous: Rendezvous,
    bounds: dict[str, float],
    host: str,
    path: Path,
    task: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    if host:
        socket.gethostname = lambda: host

    def give_up(error: BaseException) -> None:
        _end(path, None, error)

    try:
        with join(rendezvous, torch.device("cpu"), give_up=give_up, **bounds) as ranks:
            result = task(ranks, *arguments)
    except BaseException as error:
        if not isinstance(error, RankFailedError):
            traceback.print_exc()
        _end(path, None, error)
    _end(path, result, None)


def _end(path: Path, result: Any, error: BaseException | None) -> NoReturn:
    """Leave the outcome in a file and end the process."""
    path.write_bytes(pickle.dumps((result, _told(error), time.monotonic())))
    _leave(error)


def _told(error: BaseException | None) -> tuple[str, int | None, str, str] | None:
    """What `Outcome.error` says of it."""
    if error is None:
        return None
    blamed = error.rank if isinstance(error, RankFailedError) else None
    where = error.where if isinstance(error, RankFailedError) else ""
    return type(error).__name__, blamed, where, str(error)


def _leave(error: BaseException | None) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if error is None else exit_code(error))


def _outcome(path: Path, code: int | None) -> Outcome:
    if not path.exists():
        return Outcome(code)
    result, said, ended = pickle.loads(path.read_bytes())
    return Outcome(code, result, said, ended)


class WarmRanks:
    """Ranks that have met once and run one task after another, for tasks that succeed.

    There is a group for every number of ranks that is asked for. A task that fails ends its group; the next
    one gets a new group. What a task leaves in its process, the next one finds: tasks that change their
    process for good belong on ranks of their own.
    """

    def __init__(self) -> None:
        self._groups: dict[int, _WarmGroup] = {}

    def run(self, world: int, task: Callable[..., Any], *arguments: Any) -> list[Any]:
        """As `run_ranks`."""
        group = self._groups.pop(world, None) or _WarmGroup(world)
        try:
            results = group.run(task, arguments)
        except BaseException:
            group.kill()
            raise
        self._groups[world] = group
        return results

    def close(self) -> None:
        """Let all groups end in order.

        Raises:
            AssertionError: one of them does not.
        """
        codes = [code for group in self._groups.values() for code in group.end()]
        self._groups.clear()
        assert set(codes) <= {0}, codes


class _WarmGroup:
    """Some ranks that wait for tasks."""

    def __init__(self, world: int):
        port = free_port()
        self._processes, self._connections = [], []
        for rank in range(world):
            own, others = PROCESSES.Pipe()
            meeting = Rendezvous.at("127.0.0.1", port, rank=rank, world=world)
            process = PROCESSES.Process(target=_serve, args=(meeting, others), daemon=True)
            process.start()
            others.close()  # its end is seen when the process ends
            self._processes.append(process)
            self._connections.append(own)

    def run(self, task: Callable[..., Any], arguments: tuple[Any, ...]) -> list[Any]:
        work = pickle.dumps((task, arguments))
        for connection in self._connections:
            connection.send_bytes(work)
        deadline = time.monotonic() + 2 * _PATIENT + 60
        answers = [_answer(connection, deadline) for connection in self._connections]
        errors = [error for _, error in answers]
        assert errors == [None] * len(errors), errors
        return [result for result, _ in answers]

    def end(self) -> list[int | None]:
        """Exit codes."""
        for connection in self._connections:
            connection.send_bytes(b"")
        for process in self._processes:
            process.join(_PATIENT)
        codes = [process.exitcode for process in self._processes]
        self.kill()
        return codes

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def _answer(connection: Connection, deadline: float) -> tuple[Any, Any]:
    """A rank's result and what it raised; a rank that dies or says nothing in time has failed, too."""
    try:
        if not connection.poll(max(0.0, deadline - time.monotonic())):
            return None, "nothing was heard of it"
        result, error = pickle.loads(connection.recv_bytes())
    except (EOFError, OSError):
        return None, "it died"
    return result, error


def _serve(rendezvous: Rendezvous, connection: Connection) -> None:
    """A rank that runs the tasks that it is sent, until it is sent an empty one."""
    torch.set_num_threads(1)

    def end(error: BaseException) -> NoReturn:
        with contextlib.suppress(OSError):  # nobody may be there any more
            connection.send_bytes(pickle.dumps((None, _told(error))))
        _leave(error)

    try:
        with join(rendezvous, torch.device("cpu"), give_up=end, timeout=_PATIENT) as ranks:
            while work := connection.recv_bytes():
                task, arguments = pickle.loads(work)
                ranks.before_transfer(_nothing)  # what the task before had to confirm
                connection.send_bytes(pickle.dumps((task(ranks, *arguments), None)))
    except BaseException as error:
        if not isinstance(error, RankFailedError | EOFError):
            traceback.print_exc()
        end(error)
    _leave(None)


def _nothing() -> None:
    pass


__all__ = [
    "Outcome", "Ranks", "WarmRanks", "block", "die", "free_port", "run_ranks", "stop", "watch_ranks",
]  # fmt: skip
