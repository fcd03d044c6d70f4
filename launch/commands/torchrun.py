"""The command of `python -m launch.torchrun`: `generate` as one rank of the group that torchrun started."""

from __future__ import annotations

from typing import Any

import click
from rich.console import Console

from launch.commands.build_job import build_batch
from launch.commands.command import Command, verbosity_options
from launch.commands.options import generate_options
from launch.shell.exits import advising
from launch.shell.logs import set_up_logging
from launch.shell.rank import check_world, end_rank, joined, told_to_others
from launch.shell.run import run_batch_shown
from launch.shell.signals import stop_on_signals
from launch.shell.terminal import Terminal
from runtime.jobs.batch import Batch
from runtime.parallel.meeting import Rendezvous


@click.command(cls=Command)
@generate_options
@verbosity_options
def rank(verbose: bool, quiet: bool, **options: Any) -> None:
    """Make a video of PROMPT as one rank of the group that torchrun started."""
    rendezvous = Rendezvous.from_environment()
    console = Terminal(stderr=True, quiet=quiet or rendezvous.rank != 0)
    set_up_logging(Terminal(stderr=True), verbose=verbose, rank=rendezvous.rank)
    with told_to_others(rendezvous):
        batch = build_batch(**options)
        check_world(batch.first.ranks, rendezvous)
        batch.prepare()
        if rendezvous.rank == 0:
            batch.check_files()
    _run(batch, rendezvous, console)


def _run(batch: Batch, rendezvous: Rendezvous, console: Console) -> None:
    with advising(batch.advice), joined(batch.config, rendezvous, batch.first.timeout) as ranks:
        run_batch_shown(batch, console, ranks, on_loaded=stop_on_signals)


def main() -> None:
    """Run one rank, and end the process."""
    end_rank(rank, "python -m launch.torchrun")
