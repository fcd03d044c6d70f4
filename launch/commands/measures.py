"""The commands that compare presets and plan steps: `lockstep compare` and `lockstep plan`.

Imports nothing slow.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any, Literal

import click
from rich.console import Console

from launch.commands.command import Command
from launch.commands.options import sampling_options
from launch.commands.types import DAY, FileNameType, NumberType, PathType
from launch.shell.terminal import Terminal, insist, print_path
from runtime.errors import BadRequestError


@click.command(cls=Command, short_help="Compare presets with the full sampler.")
@click.argument("prompts", nargs=-1, required=True)
@sampling_options
@click.option(
    "--preset",
    "presets",
    type=FileNameType("spectrum"),
    multiple=True,
    default=("paper", "paper-fast"),
    show_default=True,
    metavar="NAME|FILE",
    help="Forecasting preset to compare; may be given several times.",
)
@click.option(
    "--seed",
    "seeds",
    type=int,
    multiple=True,
    default=(0,),
    show_default=True,
    help="Seed of the noise; may be given several times.",
)
@click.option(
    "--out",
    type=PathType(),
    default=Path("compare.mp4"),
    show_default=True,
    help="The mp4; the numbers are written to a JSON file of the same name.",
)
@click.option("--overwrite", is_flag=True, help="Replace existing files, if they are of the same kind.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the mp4's path.")
@click.pass_obj
def compare(
    console: Console,
    /,
    prompts: tuple[str, ...],
    config: str | None,
    presets: tuple[str, ...],
    seeds: tuple[int, ...],
    out: Path,
    overwrite: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Compare presets with the full sampler on the same PROMPTS and seeds.

    Writes an mp4 that shows the videos side by side (full sampler first), and a JSON file with all numbers.
    """
    from launch.commands.build_job import check_given

    check_given(config, prompts, presets=presets, **given)
    from launch.commands.compare import comparison_table, plan_comparison
    from launch.shell.progress import StepProgress, timed

    comparison = plan_comparison(
        config, prompts, presets=presets, seeds=seeds, out=out, overwrite=overwrite, **given
    )
    with timed(console, f"loading {comparison.config.model}"):
        plans = comparison.load()
    comparison.run(plans, partial(StepProgress, console))
    console.print(comparison_table(comparison))
    for warning in comparison.warnings:
        insist(console, f"warning: {warning}")
    if as_json:
        click.echo(json.dumps({"out": str(out), **comparison.summary()}))
    else:
        print_path(out)


@click.command(cls=Command, short_help="Show the best steps to compute for a budget.")
@click.argument("calibration", type=FileNameType())
@click.option("--nfe", type=int, metavar="N", help="Budget: this many computed steps.")
@click.option(
    "--psnr",
    type=NumberType(0.0, 1000.0),
    metavar="DB",
    help="Budget: the fewest steps expected to reach this PSNR against the full sampler.",
)
@click.option(
    "--seconds",
    type=NumberType(0.0, 3650 * DAY),
    metavar="SECONDS",
    help="Budget: as many steps as can be denoised within this time.",
)
@click.option(
    "--method",
    type=click.Choice(["planned", "fitted"]),
    help="Only planned forecasts, or only fitted solvers.  [default: the better one]",
)
@click.option(
    "--report",
    type=PathType(),
    help="Report whose step times are used.  [default: the calibration's step times]",
)
@click.option("--picture", type=PathType(), help="PNG file for a picture of the plan.")
@click.option(
    "--preset",
    type=PathType(),
    help="YAML file for the plan as a preset, for `generate --spectrum`.",
)
@click.option("--overwrite", is_flag=True, help="Replace existing files, if they are of the same kind.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def plan(
    calibration: str,
    nfe: int | None,
    psnr: float | None,
    seconds: float | None,
    method: Literal["planned", "fitted"] | None,
    report: Path | None,
    picture: Path | None,
    preset: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Show the best steps to compute for a budget, from CALIBRATION (a shipped name or a JSON file).

    Give one budget, or none for an overview of several numbers of steps.
    """
    from launch.commands.plan import overview, overview_table, steps_table, to_json
    from runtime.measure.plans import check_outputs, make_plan, write_plan

    if nfe is psnr is seconds is None:
        if picture or preset:
            raise BadRequestError("nfe: not given; --picture and --preset need --nfe, --psnr or --seconds")
        found = overview(calibration, report)
        if as_json:
            click.echo(json.dumps({"calibration": calibration, "plans": [one.to_json() for one in found]}))
        else:
            Terminal().print(overview_table(calibration, found))
        return
    check_outputs(calibration, picture=picture, preset=preset, overwrite=overwrite, report=report)
    chosen = make_plan(calibration, nfe=nfe, psnr=psnr, seconds=seconds, report=report, method=method)
    write_plan(chosen, picture=picture, preset=preset, overwrite=overwrite)
    if as_json:
        click.echo(json.dumps(to_json(chosen)))
    else:
        Terminal().print(steps_table(chosen))
