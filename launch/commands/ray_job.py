"""The command of `python -m launch.ray_job`: `generate` on the cluster to which a job was submitted."""

from __future__ import annotations

import signal
from typing import Any

import click

from launch.commands.command import Command, set_verbosity, verbosity_options
from launch.commands.options import generate_options
from launch.shell.exits import advising, end_with, interrupt, run_command
from launch.shell.terminal import Terminal
from runtime.parallel.signals import ending_signals


@click.command(cls=Command)
@generate_options
@verbosity_options
def job(verbose: bool, quiet: bool, **options: Any) -> None:
    """Make a video of PROMPT on a Ray cluster."""
    console = Terminal(stderr=True)
    set_verbosity(console, verbose=verbose, quiet=quiet)
    from launch.cluster.run import run_batch_on_ray
    from launch.commands.build_job import build_batch

    batch = build_batch(**options)
    batch.check_files()
    with advising(batch.advice):
        run_batch_on_ray(batch, console)


def run(arguments: list[str]) -> int:
    """Run the driver and return its exit code."""
    return run_command(job, arguments, "python -m launch.ray_job")


def main() -> None:
    """Run the driver, and end the process."""
    for number in ending_signals():
        signal.signal(number, interrupt)
    end_with(run)
