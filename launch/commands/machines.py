"""The commands about machines: `lockstep rehearse` and `lockstep doctor`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from launch.commands.command import Command
from launch.commands.options import rehearse_options
from launch.commands.types import FileNameType
from launch.shell.terminal import Terminal

if TYPE_CHECKING:
    from rich.table import Table


@click.command(cls=Command, short_help="Show what a job would need on GPUs that you do not have.")
@rehearse_options
def rehearse(*, rank: str | None, topologies: bool, as_json: bool, **options: Any) -> None:
    """Show the compute, memory and traffic of a job on GPUs that you do not have.

    The engine itself runs on fake tensors, without weights, in seconds. docs/rehearse.md explains what is
    counted and what is estimated.
    """
    from launch.commands.build_job import check_given
    from runtime.rehearsal.machine import load_gpu

    check_given(options["config"], model=options["model"], revision=options["revision"], size=options["size"])
    load_gpu(options["gpu"])
    from launch.commands.rehearse import build_scenario, chosen_ranks, show
    from runtime.rehearsal.account import to_json
    from runtime.rehearsal.options import options as ways
    from runtime.rehearsal.rehearse import rehearse as rehearsed
    from runtime.rehearsal.topologies import topologies as every_topology

    scenario = build_scenario(**options)
    found = rehearsed(scenario, chosen_ranks(rank, scenario))
    fitting = [] if found.fits else list(ways(scenario))
    compared = every_topology(scenario) if topologies else []
    if as_json:
        click.echo(json.dumps(to_json(found, fitting, compared)))
        return
    shown = Terminal()
    name = options["config"] or scenario.config.model_name
    for part in show(found, name, fitting, compared):
        shown.print(part, soft_wrap=isinstance(part, str))


@click.command(cls=Command, short_help="Show what this machine has and can run.")
@click.option(
    "--gpu",
    type=FileNameType(),
    metavar="NAME|FILE",
    help="Also rehearse each shipped config on 1, 2, 4 and 8 of these GPUs, which you need not have: h100, "
    "h200, b200, 4090, or a YAML file. Takes about a minute.",
)
@click.option(
    "--model",
    type=FileNameType(),
    metavar="SRC",
    help="Show a model instead: a folder or repository, or the YAML file of a config.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(gpu: str | None, model: str | None, as_json: bool) -> None:
    """Show what this machine has, and which models and topologies it can run.

    With --model, show the kind of the model SRC, its components, and their files: docs/models.md.
    """
    from launch.commands.doctor import examine, to_json

    if model is not None:
        from launch.commands.model_source import model_of

        named = model_of(model)
        from launch.commands.doctor_models import examine_model, model_table

        seen = examine_model(model, named)
        _show(as_json, lambda: asdict(seen), lambda: [model_table(seen)])
        return
    if gpu is None:
        _show(as_json, to_json, examine)
        return
    from runtime.rehearsal.machine import load_gpu

    card = load_gpu(gpu)
    if not as_json:
        _show(as_json, to_json, examine)  # before what takes a minute
    from launch.commands.doctor_models import fits_table, rehearsed

    found = rehearsed(card)
    fits = {name: {world: asdict(fit) for world, fit in one.items()} for name, one in found.items()}
    rehearsal = {"gpu": card.name, "memory_gib": card.memory_gib, "configs": fits}
    _show(as_json, lambda: {**to_json(), "rehearsed": rehearsal}, lambda: [fits_table(card, found)])


def _show(
    as_json: bool, content: Callable[[], dict[str, Any]], tables: Callable[[], Iterable[Table]]
) -> None:
    if as_json:
        click.echo(json.dumps(content()))
        return
    for table in tables():
        Terminal().print(table)
