"""Starts the ranks of one job on this machine, with torchrun's own agent, and sees them end."""

from __future__ import annotations

import os
import signal
import sys
import uuid
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from runtime.errors import CancelledError, JobFailedError

_EXPLAINED = (2, 3, 130)  # exit codes of the command line's contract
_SHUTDOWN = (
    600  # seconds that ranks have to end a step and keep a checkpoint, when this process is told to end
)


def run_on_this_machine(ranks: int, module: str, arguments: Sequence[str]) -> int:
    """Run `python -m module arguments` as `ranks` processes; exactly as torchrun would, at a free port.

    Returns:
        0, or the exit code of the rank that failed first, which has said why.

    Raises:
        CancelledError: this process was told to end, and has ended the ranks.
        JobFailedError: a rank was killed, or ended before it could say anything.
    """
    threads = max(1, (os.cpu_count() or 1) // ranks)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # more threads than cores stall each other
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(_SHUTDOWN))
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # `nohup`, which the agent would not mind
        os.environ.setdefault("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGQUIT")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),  # or a folder is left behind each time
    )
    try:
        elastic_launch(config, sys.executable)("-m", module, *arguments)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        if failure.exitcode in _EXPLAINED:
            return failure.exitcode
        how = f"exit code {failure.exitcode}" if failure.exitcode > 0 else failure.signal_name()
        raise JobFailedError(f"rank {failure.local_rank} was ended by {how}") from None
    except SignalException as error:
        raise CancelledError(f"ended by {signal.Signals(error.sigval).name}") from None
    return 0
