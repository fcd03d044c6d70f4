"""Frame of every rank command under torchrun: join the other ranks, and report why this one leaves.

The first rank prints. When it fails, the first rank of every other node prints its reason as well; all others
only log, and every line of a log names its rank.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import click

from launch.shell.exits import (
    EXIT_BAD_REQUEST,
    EXIT_FAILED,
    check_arguments,
    end_now,
    exit_code,
    explain,
    explain_usage,
    give_up,
    interrupt,
    open_streams,
)
from launch.shell.signals import ignore_signals
from runtime.errors import BadRequestError, LockstepError, RankFailedError
from runtime.parallel.devices import pick_device
from runtime.parallel.meeting import MEETING, Rendezvous, leave
from runtime.parallel.ranks import Ranks, join
from runtime.parallel.signals import ending_signals
from runtime.request.config import Config

log = logging.getLogger("launch")


@contextmanager
def told_to_others(rendezvous: Rendezvous) -> Iterator[None]:
    """Tell the other ranks when an exception in the block keeps this rank from joining them."""
    try:
        yield
    except Exception as error:
        ignore_signals()  # an agent that sees another rank leave because of this may end the rest
        leave(rendezvous, error)
        raise


def check_world(ranks: int | None, rendezvous: Rendezvous) -> None:
    """Refuse `--ranks` that differs from the number of ranks that torchrun started.

    Raises:
        BadRequestError: they differ.
    """
    if ranks not in (None, rendezvous.world):
        raise BadRequestError(f"ranks: {ranks} given; torchrun started {rendezvous.world}")


@contextmanager
def joined(config: Config, rendezvous: Rendezvous, timeout: float) -> Iterator[Ranks]:
    """Join the other ranks of the launch; the block runs with this rank's `Ranks`."""
    with told_to_others(rendezvous):
        device = pick_device(config.device, rendezvous.local_rank)
    with join(
        rendezvous,
        device,
        timeout=timeout,
        busy=config.busy_timeout,
        give_up=give_up,
        on_failure=ignore_signals,  # the agent's must not cut the ending short
    ) as ranks:
        yield ranks
        ignore_signals()


def end_rank(command: click.Command, name: str) -> None:
    """Run one rank's command and end the process, without waiting for transfers that will never complete."""
    open_streams()
    for number in ending_signals():
        signal.signal(number, interrupt)
    end_now(run(sys.argv[1:], command, name))


def run(arguments: list[str], command: click.Command, name: str) -> int:
    """Run one rank and return its exit code."""
    try:
        check_arguments(arguments)
        command.main(arguments, prog_name=name, standalone_mode=False)
    except click.ClickException as error:
        with suppress(BadRequestError):
            leave(Rendezvous.from_environment(), BadRequestError(error.format_message()))
        return explain_usage(error) if _is("LOCAL_RANK", 0) else EXIT_BAD_REQUEST
    except (Exception, KeyboardInterrupt) as error:
        return _end(error)
    return 0


def _end(error: BaseException) -> int:
    """Return the exit code, and explain the failure on the first rank (on the second if the first died
    silently) and on the first rank of every other node."""
    failed = error if isinstance(error, RankFailedError) and error.rank == 0 else None
    if _is("RANK", 0):
        # At the meeting, perhaps nobody else is there.
        speaks = failed is None or failed.where == MEETING or _is("LOCAL_WORLD_SIZE", 1)
    else:
        speaks = _is("LOCAL_RANK", 0) or (failed is not None and not failed.told and _is("RANK", 1))
    if speaks:
        return explain(error)
    code = exit_code(error)
    if code == EXIT_FAILED and not isinstance(error, LockstepError):
        log.error("unexpected failure", exc_info=error)
    else:
        log.info("ending: %s", error)
    return code


def _is(variable: str, number: int) -> bool:
    """Return whether the environment variable has this value; missing or malformed counts as 0."""
    text = os.environ.get(variable, "")
    return (int(text) if text.isdecimal() else 0) == number
