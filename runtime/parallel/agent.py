"""Starts the ranks of one job on this machine, with torchrun's own agent, and waits for their end."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous import registry as meeting_places
from torch.distributed.launcher.api import LaunchConfig

from runtime.errors import CancelledError, JobFailedError

log = logging.getLogger(__name__)

_FAILED = 3
_EXPLAINED = (
    _FAILED,
    2,
    130,
)  # exit codes of the command line's contract; the first that occurs is the job's
_LOOK = 0.1  # seconds between two polls of the ranks
_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SAME = 1.0  # seconds within which two signals are one: a terminal and a supervisor may both send it
_SHUTDOWN = (
    600  # seconds that ranks have to end a step and save a checkpoint, when this process is told to end
)


def run_on_this_machine(ranks: int, module: str, arguments: Sequence[str]) -> int:
    """Run `python -m module arguments` as `ranks` processes, as torchrun would, at a free port.

    From the first rank's start on, SIGINT, SIGTERM and SIGHUP are passed on to the ranks, whose exit codes
    decide: the first rank has written the result, or explained why there is none.

    Returns:
        0, or the exit code of the rank that explained its failure.

    Raises:
        CancelledError: this process was told to end, and the ranks ended without an explanation.
        JobFailedError: a rank was killed, or ended before it could explain anything.
    """
    threads = max(1, (os.cpu_count() or 1) // ranks)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # more threads than cores stall each other
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"  # torch's way loses how the ranks ended
    logs = DefaultLogsSpecs(log_dir=os.devnull)  # or a folder is left behind each time
    usual = LaunchConfig(1, 1, ranks, logs_specs=logs)
    place = RendezvousParameters("c10d", "localhost:0", str(uuid.uuid4()), 1, 1, local_addr="localhost")
    spec = WorkerSpec(
        role="default",
        local_world_size=ranks,
        rdzv_handler=meeting_places.get_rendezvous_handler(place),
        entrypoint=sys.executable,
        args=("-m", module, *arguments),
        max_restarts=0,
        monitor_interval=_LOOK,
        local_addr="localhost",
        numa_options=usual.numa_options,
    )
    agent = _Agent(spec, logs)
    try:
        failures = agent.run().failures.values()
    except SignalException as error:
        raise CancelledError(f"ended by {signal.Signals(error.sigval).name}") from None
    finally:
        spec.rdzv_handler.shutdown()
    codes = agent.codes
    if codes[0] in _EXPLAINED or codes[:2] == [codes[0], _FAILED]:
        return next(code for code in _EXPLAINED if code in codes)
    if codes[0] == 0:  # the first rank is the last to leave: all is written
        for failure in failures:
            log.warning("after the job was done, %s", _ended(failure))
        return 0
    if agent.told is not None:
        raise CancelledError(f"ended by {agent.told.name}")
    raise JobFailedError(_ended(min(failures, key=lambda failure: failure.timestamp)))


def _ended(failure: ProcessFailure) -> str:
    code = failure.exitcode
    how = f"exit code {code}" if code > 0 else signal.Signals(-code).name
    return f"rank {failure.local_rank} was ended by {how}"


class _Agent(LocalElasticAgent):
    """torchrun's agent, which also passes signals on to the ranks and waits until they have ended.

    Attributes:
        told: last signal that was passed on; None if there was none.
    """

    def __init__(self, spec: WorkerSpec, logs_specs: DefaultLogsSpecs):
        super().__init__(spec, logs_specs, shutdown_timeout=_SHUTDOWN)
        self.told: signal.Signals | None = None
        self._heard: list[float] = []  # times of the signals received
        self._started = False

    @property
    def codes(self) -> list[int]:
        """Exit codes of the ranks, negative for a signal, once all have ended."""
        codes = [handler.proc.poll() for handler in self._processes()]
        return [-signal.SIGKILL if code is None else code for code in codes]  # stuck in the kernel

    def _processes(self) -> list[SubprocessHandler]:
        handlers: dict[int, SubprocessHandler] = getattr(self._pcontext, "subprocess_handlers", {})
        return [handlers[rank] for rank in sorted(handlers)]

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        for number in _PASSED_ON:
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
                signal.signal(number, self._hear)
        started: dict[int, Any] = super()._start_workers(worker_group)
        self._started = True
        if self._heard:  # meanwhile
            self._pass_on()
        return started

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        """Monitor as torch does, which ends all ranks once one has failed; after a signal, wait longer."""
        if self._heard and any(handler.proc.poll() is None for handler in self._processes()):
            if time.monotonic() - self._heard[0] > _SHUTDOWN:
                self._send(signal.SIGKILL)
            return RunResult(state=WorkerState.HEALTHY)
        result: RunResult = super()._monitor_workers(worker_group)
        return result

    def _hear(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._heard and now - self._heard[-1] < _SAME:
            return
        self._heard.append(now)
        self.told = signal.Signals(number)
        if self._started:
            self._pass_on()

    def _pass_on(self) -> None:
        """Pass a signal on: the first ends ranks after a step, the second at once, the third kills them.

        The first two are sent as SIGTERM: a Python without a handler yet dies of it without a traceback.
        """
        self._send(signal.SIGTERM if len(self._heard) < 3 else signal.SIGKILL)

    def _send(self, number: signal.Signals) -> None:
        for handler in self._processes():
            if handler.proc.poll() is None:
                with suppress(ProcessLookupError):
                    handler.close(number)
