"""One rank under torchrun: `torchrun --nproc-per-node N -m launch.torchrun PROMPT …`, options as `generate`.

The first rank prints; the others speak through their logs, in which every line names its rank.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click
from rich.console import Console

from launch.exits import (
    EXIT_BAD_REQUEST,
    EXIT_FAILED,
    advising,
    check_arguments,
    end_now,
    exit_code,
    explain,
    open_streams,
)
from launch.jobs import Job, build_job
from launch.logs import set_up_logging
from launch.options import generate_options
from launch.run import run_job_shown
from launch.signals import ignore_signals, stop_on_signals
from launch.terminal import Terminal
from runtime.configs import Config
from runtime.devices import pick_device
from runtime.errors import BadRequestError, LockstepError, RankFailedError
from runtime.ranks import Ranks, Rendezvous, join

log = logging.getLogger("launch")


@click.command()
@generate_options
@click.option("-v", "--verbose", is_flag=True, help="Say more on stderr.")
def rank(verbose: bool, **options: Any) -> None:
    """Make a video of PROMPT as one rank of the group that torchrun started."""
    rendezvous = Rendezvous.from_environment()
    console = Terminal(stderr=True, quiet=rendezvous.rank != 0)
    set_up_logging(Terminal(stderr=True), verbose=verbose, rank=rendezvous.rank)
    job = build_job(**options)
    if job.ranks not in (None, rendezvous.world):
        raise BadRequestError(f"ranks: {job.ranks} given; torchrun started {rendezvous.world}")
    if rendezvous.rank == 0:
        job.check_files()
    _run(job, rendezvous, console)


def _run(job: Job, rendezvous: Rendezvous, console: Console) -> None:
    with advising(job.advice), joined(job.config, rendezvous, job.timeout) as ranks:
        run_job_shown(job, console, ranks, on_loaded=stop_on_signals)


@contextmanager
def joined(config: Config, rendezvous: Rendezvous, timeout: float) -> Iterator[Ranks]:
    """This rank among the others that were started with it."""
    device = pick_device(config.device, rendezvous.local_rank)
    with join(rendezvous, device, timeout=timeout, give_up=_give_up) as ranks:
        try:
            yield ranks
        except BaseException:
            ignore_signals()  # the end has begun; the agent's must not cut it short
            raise


def _give_up(error: LockstepError) -> None:
    """The main thread is stuck and cannot be told; end the process all the same."""
    log.error("%s; this rank is stuck and ends now", error)
    os._exit(EXIT_FAILED)


def end_rank(command: click.Command, name: str) -> None:
    """Run one rank's command and end the process, without waiting for transfers that will never be done."""
    open_streams()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    end_now(run(sys.argv[1:], command, name))


def run(arguments: list[str], command: click.Command = rank, name: str = "python -m launch.torchrun") -> int:
    """Run one rank and return its exit code."""
    own = int(os.environ.get("RANK", "0"))
    try:
        check_arguments(arguments)
        command.main(arguments, prog_name=name, standalone_mode=False)
    except click.ClickException as error:
        if own == 0:
            error.show()
        return EXIT_BAD_REQUEST
    except (Exception, KeyboardInterrupt) as error:
        return _end(error, own)
    return 0


def _end(error: BaseException, own: int) -> int:
    """One rank explains: the first, or the second if the first is what failed."""
    speaker = 1 if isinstance(error, RankFailedError) and error.rank == 0 else 0
    if own == speaker:
        return explain(error)
    code = exit_code(error)
    if code == EXIT_FAILED and not isinstance(error, RankFailedError):
        log.error("unexpected failure", exc_info=error)
    else:
        log.info("ends: %s", error)
    return code


if __name__ == "__main__":
    end_rank(rank, "python -m launch.torchrun")
