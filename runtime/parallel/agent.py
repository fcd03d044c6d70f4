"""Starts the ranks of one job on this machine, with torchrun's own agent, and waits for their end."""

from __future__ import annotations

import logging
import os
import signal
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

from runtime.errors import BadRequestError, CancelledError, JobFailedError
from runtime.files.interpreter import interpreter
from runtime.parallel.signals import ENDING, SignalCount

log = logging.getLogger(__name__)

_FAILED, _REFUSED, _CANCELLED = 3, 2, 130
_EXPLAINED = (_FAILED, _REFUSED, _CANCELLED)  # exit codes of the contract; the first that occurs is the job's
_LOOK = 0.1  # seconds between two polls of the ranks
_SHUTDOWN = 600  # seconds for ranks to end a step and save a checkpoint when this process is told to end
_EXPLAINING = 60.0  # seconds for the first rank to find out why another has ended, and to explain it


def run_on_this_machine(ranks: int, module: str, arguments: Sequence[str]) -> int:
    """Run `python -m module arguments` as `ranks` processes, as torchrun would, at a free port.

    From the first rank's start on, SIGINT, SIGTERM and SIGHUP are passed on to the ranks, whose exit codes
    decide: the first rank has written the result, or explained why there is none.

    Returns:
        0, or the exit code of the rank that explained its failure.

    Raises:
        BadRequestError: a rank refused, and the first did not end in time to explain it.
        CancelledError: this process was told to end, and the ranks ended without an explanation.
        JobFailedError: a rank was killed, or ended before it could explain anything.
    """
    threads = max(1, (os.cpu_count() or 1) // ranks)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # more threads than cores stall each other
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"  # torch's way loses how the ranks ended
    logs = DefaultLogsSpecs(log_dir=os.devnull)  # or a folder is left behind each time
    usual = LaunchConfig(1, 1, ranks, logs_specs=logs)
    place = RendezvousParameters("c10d", "localhost:0", str(uuid.uuid4()), 1, 1, local_addr="localhost")
    python, *options = interpreter()
    spec = WorkerSpec(
        role="default",
        local_world_size=ranks,
        rdzv_handler=meeting_places.get_rendezvous_handler(place),
        entrypoint=python,
        args=(*options, "-m", module, *arguments),
        max_restarts=0,
        monitor_interval=_LOOK,
        local_addr="localhost",
        numa_options=usual.numa_options,
    )
    agent = _Agent(spec, logs)
    try:
        failures = list(agent.run().failures.values())
    except SignalException as error:
        raise CancelledError(f"ended by {signal.Signals(error.sigval).name}") from None
    finally:
        spec.rdzv_handler.shutdown()
    return _outcome(agent.codes, failures, agent.told)


def _outcome(codes: list[int], failures: list[ProcessFailure], told: signal.Signals | None) -> int:
    """Exit code of the job; see `run_on_this_machine`.

    Args:
        codes: how the ranks ended.
        failures: those that did not end well.
        told: signal that was passed on to them.
    """
    first = min(failures, key=lambda failure: failure.timestamp, default=None)
    if codes[0] == _CANCELLED and told is None and first is not None and first.exitcode not in _EXPLAINED:
        raise JobFailedError(_ended(first))  # because of it, the first rank was told to end
    if codes[0] in _EXPLAINED or (codes[0] != 0 and codes[1:2] == [_FAILED]):
        return next(code for code in _EXPLAINED if code in codes)
    if codes[0] == 0 or first is None:  # the first rank is the last to leave: all is written
        for failure in failures:
            log.warning("after the job was done, %s", _ended(failure))
        return 0
    if told is not None:
        raise CancelledError(f"ended by {told.name}")
    if _REFUSED in codes:
        raise BadRequestError(
            f"rank {codes.index(_REFUSED)} refuses the request, but rank 0 ended before it gave the reason; "
            "--verbose shows it"
        )
    raise JobFailedError(_ended(first))


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
        super().__init__(spec, logs_specs)
        self.told: signal.Signals | None = None
        self._heard = SignalCount()
        self._started = False
        self._over = 0.0  # when the first rank was seen that has ended, after a signal
        self._explained = 0.0  # when a rank was seen that has ended and explained it to the first

    @property
    def codes(self) -> list[int]:
        """Exit codes of the ranks, negative for a signal, once all have ended."""
        codes = [handler.proc.poll() for handler in self._processes()]
        return [-signal.SIGKILL if code is None else code for code in codes]  # stuck in the kernel

    def _processes(self) -> list[SubprocessHandler]:
        handlers: dict[int, SubprocessHandler] = getattr(self._pcontext, "subprocess_handlers", {})
        return [handlers[rank] for rank in sorted(handlers)]

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        for number in ENDING:
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
                signal.signal(number, self._hear)
        started: dict[int, Any] = super()._start_workers(worker_group)
        self._started = True
        if self._heard.count:  # meanwhile
            self._pass_on()
        return started

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        """Monitor as torch does, which ends all ranks once one has failed. After a signal, wait longer; and
        if the first rank is about to end as well, wait until it has.

        Torch looks at the ranks again. It is let do so only if what was seen here ends the job: a rank that
        ends between the two looks is left to the next one.
        """
        codes = [handler.proc.poll() for handler in self._processes()]
        running = None in codes
        if self._heard.count and running:
            if codes[0] is not None:  # nothing is left to save
                self._over = self._over or time.monotonic()
            late = self._over and time.monotonic() - self._over > _EXPLAINING
            if late or self._heard.since() > _SHUTDOWN:
                self._send(signal.SIGKILL)
            return RunResult(state=WorkerState.HEALTHY)
        if running and (not any(codes) or self._explaining(codes)):
            return RunResult(state=WorkerState.HEALTHY)
        result: RunResult = super()._monitor_workers(worker_group)
        return result

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, *usual: Any, **named: Any) -> None:
        """Give ranks as long as they need; torch 2.11 and 2.12 have no setting for it."""
        if self._pcontext is not None:
            self._pcontext.close(death_sig, _SHUTDOWN)
        super()._shutdown(death_sig)

    def _explaining(self, codes: Sequence[int | None]) -> bool:
        """Return whether the first rank still has time to read why another rank ended."""
        first, *others = codes
        if first is not None or not any(code in _EXPLAINED for code in others):
            return False
        self._explained = self._explained or time.monotonic()
        return time.monotonic() - self._explained < _EXPLAINING

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if not self._heard.hear():
            return
        self.told = signal.Signals(number)
        if self._started:
            self._pass_on()

    def _pass_on(self) -> None:
        """Pass a signal on: the first ends ranks after a step, the second at once, the third kills them.

        The first two are sent as SIGTERM: a Python without a handler yet dies of it without a traceback. When
        the first rank has ended, nothing is left to save, and the second kills those that did not hear.
        """
        saving = any(handler.proc.poll() is None for handler in self._processes()[:1])
        self._send(signal.SIGTERM if self._heard.count < (3 if saving else 2) else signal.SIGKILL)

    def _send(self, number: signal.Signals) -> None:
        for handler in self._processes():
            if handler.proc.poll() is None:
                with suppress(ProcessLookupError):
                    handler.close(number)
