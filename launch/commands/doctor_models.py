"""What `lockstep doctor` says of models: what one is read from, and on which GPUs the shipped configs fit."""

from __future__ import annotations

import math

from rich.table import Table

from launch.commands.conversion import model_of
from launch.commands.doctor import WORLDS
from runtime.files.text import read_json
from runtime.models.layouts.convert import survey
from runtime.parallel.topology import Degrees
from runtime.rehearsal.machine import Gpu
from runtime.rehearsal.options import first_that_fits
from runtime.rehearsal.rehearse import Scenario
from runtime.request.config import Config, available, load_config


def fits(gpu: Gpu) -> Table:
    """Rehearse every config on 1, 2, 4 and 8 GPUs; tell the peak memory, and what would make it fit.

    Args:
        gpu: the GPU.
    """
    table = Table(title=f"Rehearsed, not measured: peak memory on {gpu.name}, of {gpu.memory_gib:g} GiB")
    table.add_column("config", no_wrap=True)
    for world in WORLDS:
        table.add_column(f"{world}, GiB")
    for name in available("."):
        table.add_row(name, *(_fit(load_config(name), world, gpu) for world in WORLDS))
    table.caption = (
        "At the config's size, with its preset. 2 GiB and 5 % of the memory are assumed to be lost. "
        "`lockstep rehearse` shows more of each."
    )
    return table


def _fit(config: Config, world: int, gpu: Gpu) -> str:
    """Peak memory of a config, with the memory options without which it would not fit."""
    scenario = Scenario(config, config.request("rehearsed"), Degrees(), world, gpu)
    found = first_that_fits(scenario)
    if found is None:
        return "does not fit"
    changes = [f"{field}: {value}" for field, value in found.changes.items()]
    return "\n".join([f"{found.rehearsal.peak / 2**30:.1f}", *changes])


def examine_model(source: str) -> Table:
    """Describe a model: its components, and the files that they are read from.

    Args:
        source: a folder or repository, or the YAML file of a config.

    Raises:
        BadRequestError: it is missing, incomplete or not supported; the message says what was seen.
    """
    found = survey(model_of(source))
    pipeline = read_json(found.source / "model_index.json")["_class_name"]
    table = Table(title=f"{source}: a {pipeline}, {found.revision}")
    for name in ("component", "parameters", "dtypes"):
        table.add_column(name, no_wrap=True)
    table.add_column("read from", overflow="fold")
    for component in dict.fromkeys(file.name.split("/")[0] for file in found.files):
        weights = next(file.weights for file in found.files if file.name.startswith(f"{component}/"))
        stored = [weight.stored for weight in weights.values()]
        table.add_row(
            component,
            f"{sum(math.prod(weight.shape) for weight in weights.values()):,}",
            ", ".join(sorted({one.dtype for one in stored})),
            "\n".join(str(file) for file in dict.fromkeys(one.file for one in stored)),
        )
    return table
