"""The command `lockstep`.

Exit codes: 0 done, 2 bad request (nothing was started), 3 the job failed, 130 cancelled. Progress goes to
stderr; only the path of the result goes to stdout.
"""

from __future__ import annotations

import logging
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from launch.commands.command import VERBOSITY, Command, set_verbosity, verbosity_options
from launch.commands.convert import convert
from launch.commands.machines import doctor, rehearse
from launch.commands.measures import compare, plan
from launch.commands.options import calibrate_options, generate_options
from launch.commands.queue import queue, status
from launch.commands.sections import Sections
from launch.commands.settings import config, preset
from launch.commands.types import DEGREE, PRICE, REPLICAS, FileNameType, PathType
from launch.http.command import keys, serve
from launch.shell.exits import advising, end_with, interrupt, run_command
from launch.shell.terminal import Terminal, print_path
from runtime.errors import BadRequestError
from runtime.parallel.signals import ending_signals

if TYPE_CHECKING:  # it takes seconds
    from runtime.profile import ModelProfile
    from runtime.request.config import Config

log = logging.getLogger("launch")

_ARGUMENTS = "lockstep.arguments"
_EPILOG = """\b
Start with:  lockstep generate "a red circle growing on a gray background"
Exit codes:  0 done, 2 bad request (nothing was started), 3 the job failed,
             130 cancelled
Progress goes to stderr, only the path of the result to stdout.
More: README.md and docs/"""


@click.group(
    cls=Sections,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog=_EPILOG,
)
@click.version_option(package_name="lockstep-video")
@verbosity_options
@click.pass_context
def cli(context: click.Context, verbose: bool, quiet: bool) -> None:
    """Generate video with Wan2.1 and 2.2 on one GPU or many. Most steps are forecast instead of computed."""
    context.obj = console = Terminal(stderr=True)
    set_verbosity(console, verbose=verbose, quiet=quiet)


class _KeepsArguments(Command):
    """A command that keeps its raw arguments, to pass them on to other processes."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[_ARGUMENTS] = list(args)
        return super().parse_args(ctx, args)


@cli.command(cls=_KeepsArguments, short_help="Make a video from a prompt.")
@generate_options
@click.option(
    "--launcher",
    type=click.Choice(["inline", "torchrun", "ray"]),
    help="How to start the ranks.  [default: inline for one rank, ray for more]",
)
@click.pass_context
def generate(context: click.Context, /, launcher: str | None, **options: Any) -> None:
    """Make a video from PROMPT, or from each line of a file; write an mp4, a report and a picture of the run.

    With --ranks N, N processes on this machine make it together. To use several machines, start
    `python -m launch.torchrun` with torchrun: docs/ranks.md.
    """
    from launch.commands.build_job import build_batch

    batch = build_batch(**options)
    ranks = batch.first.ranks
    launcher = launcher or ("inline" if ranks in (None, 1) else "ray")
    if launcher == "inline" and ranks not in (None, 1):
        raise BadRequestError(
            f"launcher: 'inline' given; it runs a single rank, {ranks} need ray or torchrun"
        )
    batch.check_files()
    if not batch.left:
        from launch.shell.run import print_made

        print_made(batch, context.obj)
        return
    with advising(batch.advice):
        if launcher == "ray":
            from launch.cluster.run import run_batch_on_ray

            run_batch_on_ray(batch, context.obj)
        elif launcher == "torchrun":
            _run_on_ranks(batch.first.world, batch.config.device, "launch.torchrun", context)
        else:
            from launch.shell.run import run_batch_shown
            from launch.shell.signals import stop_on_signals

            run_batch_shown(batch, context.obj, on_loaded=stop_on_signals)


def _run_on_ranks(ranks: int, device: str, module: str, context: click.Context) -> None:
    """Start the ranks on this machine and exit with the exit code of the rank that explained it, if one did.

    Raises:
        LockstepError: see `run_on_this_machine`; no rank explained it.
    """
    from runtime.parallel.agent import run_on_this_machine
    from runtime.parallel.devices import check_room

    crowded = check_room(ranks, device)
    if crowded:
        log.warning(crowded)
    given = context.find_root().params
    flags = [f"--{name}" for name in VERBOSITY if given.get(name)]
    arguments = [*flags, *without_launcher(context.meta[_ARGUMENTS])]
    code = run_on_this_machine(ranks, module, arguments)
    if code:
        context.exit(code)


def without_launcher(arguments: list[str]) -> list[str]:
    """Remove `--launcher NAME`, which ranks do not take."""
    kept = list(arguments)
    while "--launcher" in kept:
        at = kept.index("--launcher")
        del kept[at : at + 2]
    return [argument for argument in kept if not argument.startswith("--launcher=")]


@cli.command(cls=_KeepsArguments, short_help="Measure a model, so that steps can be planned.")
@calibrate_options
@click.pass_context
def calibrate(context: click.Context, /, ranks: int | None, timeout: float | None, **options: Any) -> None:
    """Measure how a model's output changes from step to step, to plan steps and to weight forecasts.

    Runs the full sampler on some prompts, fits solvers for some numbers of computed steps, and writes one
    small JSON file. Finished runs are kept in the same folder; after an interruption, the same command
    resumes from them.
    """
    from launch.commands.build_job import check_given

    own = ("config", "prompts", "seed", "out", "overwrite", "budgets", "add_solvers")
    check_given(options["config"], **{name: one for name, one in options.items() if name not in own})
    from launch.commands.calibrate import plan_calibration, run_calibration
    from launch.shell.signals import ignore_signals, stop_on_signals

    job = plan_calibration(**options)
    if ranks not in (None, 1):
        with advising(job.advice):
            _run_on_ranks(ranks, job.config.device, "launch.commands.calibrate", context)
        return
    run_calibration(job, context.obj, on_loaded=stop_on_signals)
    ignore_signals()  # the file is written
    print_path(job.out)


@cli.command(short_help="Make a film from a file of shots.")
@click.argument("storyboard", required=False, type=PathType())
@click.option("--out", type=PathType(), help="Folder of the film; created if it does not exist.")
@click.option(
    "--replicas",
    type=REPLICAS,
    default=1,
    show_default=True,
    metavar="N",
    help="Shots made at the same time.",
)
@click.option("--ranks", type=DEGREE, metavar="N", help="Processes that make a shot together.  [default: 1]")
@click.option("--only", multiple=True, metavar="ID", help="Make only this shot; may be given several times.")
@click.option("--dry-run", is_flag=True, help="Show the time and steps of each shot, and make nothing.")
@click.option(
    "--price", type=PRICE, help="Price of one rank for one hour, for the costs that --dry-run shows."
)
@click.option(
    "--gpu",
    type=FileNameType(),
    metavar="NAME|FILE",
    help="GPU, such as h100, for which --dry-run estimates shots without measured times.",
)
@click.option("--audio", type=PathType(), help="Sound track of the film, in any format that ffmpeg reads.")
@click.option("--compare", is_flag=True, help="Also compare each shot that is made with the full sampler.")
@click.option(
    "--prune",
    is_flag=True,
    help="Remove the files of replaced shots, and make nothing; with --dry-run, only list them.",
)
@click.option("--schema", is_flag=True, help="Print the JSON schema of storyboard files, and make nothing.")
@click.option("--json", "as_json", is_flag=True, help="With --dry-run: print one JSON object.")
@click.pass_obj
def storyboard(
    console: Console,
    /,
    storyboard: Path | None,
    out: Path | None,
    replicas: int,
    ranks: int | None,
    only: tuple[str, ...],
    dry_run: bool,
    price: float | None,
    gpu: str | None,
    audio: Path | None,
    compare: bool,
    prune: bool,
    schema: bool,
    as_json: bool,
) -> None:
    """Make one film from the shots of the YAML file STORYBOARD, with replicas on Ray.

    Shots whose request, model and version are unchanged are not made again. After an interruption, the same
    command makes the remaining shots. How to write the file: docs/storyboards.md.
    """
    import json

    if schema:
        from runtime.film.storyboard import Storyboard

        click.echo(json.dumps(Storyboard.model_json_schema(), indent=2))
        return
    if as_json and (prune or not dry_run):
        raise BadRequestError("json: it needs --dry-run")
    if storyboard is None or out is None:
        raise BadRequestError("storyboard: give the file, and --out with the folder of the film")
    from launch.film.shots import plan_film
    from runtime.files.checks import check_outlives

    check_outlives(out, field="out")
    options: dict[str, Any] = {"out": out, "only": only, "ranks": ranks, "audio": audio, "compare": compare}
    if dry_run and not prune:  # which removes what no shot needs: the names of files depend on the model's
        from runtime.rehearsal.machine import load_gpu

        card = None if gpu is None else load_gpu(gpu)
        options["profile"] = _profile_of_shot
    film = plan_film(storyboard, **options)
    if prune:
        from launch.film.prune import find_replaced, listing
        from launch.film.prune import prune as remove

        Terminal().print(listing((find_replaced if dry_run else remove)(film), out), soft_wrap=True)
        return
    if dry_run:
        from launch.film.dry_run import dry_run_table, estimate_all
        from launch.film.folder import check_out

        check_out(out)
        found = estimate_all(film, replicas, price, card)
        if as_json:
            click.echo(json.dumps(found.to_json()))
        else:
            Terminal().print(dry_run_table(found))
        return
    from launch.film.make import make_film

    with advising(film.advice):
        path = make_film(film, replicas, console)
    if path is not None:
        print_path(path)


def _profile_of_shot(config: Config) -> ModelProfile:
    """Profile for an estimate; imports what takes seconds only once the storyboard has been read."""
    from launch.film.dry_run import profile_of

    return profile_of(config)


cli.add_command(compare)
cli.add_command(plan)
cli.add_command(rehearse)
cli.add_command(doctor)
cli.add_command(convert)
cli.add_command(config)
cli.add_command(preset)
cli.add_command(queue)
cli.add_command(status)
cli.add_command(serve)
cli.add_command(keys)


def main() -> None:
    """Run the command line and end the process with one of the exit codes of the contract."""
    for number in ending_signals():
        signal.signal(number, interrupt)  # ends the job in order, with nothing half-written
    end_with(run)


def run(arguments: list[str]) -> int:
    """Run the command line and return its exit code."""
    return run_command(cli, arguments, "lockstep")


if __name__ == "__main__":
    main()
