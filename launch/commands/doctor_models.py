"""What `lockstep doctor` says of models: what one is read from, and on which GPUs the shipped configs fit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.table import Table

from launch.commands.doctor import WORLDS
from runtime.files.text import read_json
from runtime.models.layouts.convert import survey
from runtime.parallel.topology import Degrees
from runtime.rehearsal.machine import Gpu
from runtime.rehearsal.options import first_that_fits
from runtime.rehearsal.rehearse import Scenario
from runtime.request.config import Config, ModelFiles, available, load_config


@dataclass(frozen=True, slots=True)
class Fit:
    """Whether a config fits GPUs.

    Attributes:
        peak: peak memory in bytes; None if it does not fit.
        changes: memory options without which it would not fit.
    """

    peak: int | None
    changes: dict[str, str]


def rehearsed(gpu: Gpu) -> dict[str, dict[int, Fit]]:
    """Rehearse every config at its own size on 1, 2, 4 and 8 GPUs: config → GPUs → what was found."""
    return {name: {world: _fit(load_config(name), world, gpu) for world in WORLDS} for name in available(".")}


def fits_table(gpu: Gpu, found: Mapping[str, Mapping[int, Fit]]) -> Table:
    """Make a table of what `rehearsed` found: the peak memory, and what would make it fit."""
    table = Table(
        title=f"Rehearsed, not measured: peak memory on {gpu.name}, of {gpu.memory_gib:g} GiB",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("config", no_wrap=True)
    for world in WORLDS:
        table.add_column(f"{world}, GiB", overflow="fold")
    for name, fits in found.items():
        table.add_row(name, *(_told(fits[world]) for world in WORLDS))
    table.caption = (
        "At the config's size, with its preset. 2 GiB and 5 % of the memory are assumed to be lost. "
        "`lockstep rehearse` shows more of each."
    )
    return table


def _told(fit: Fit) -> str:
    if fit.peak is None:
        return "does not fit"
    changes = (f"{change} {field.removeprefix('memory.')}" for field, change in fit.changes.items())
    return "\n".join([f"{fit.peak / 2**30:.1f}", *changes])


def _fit(config: Config, world: int, gpu: Gpu) -> Fit:
    """Peak memory of a config, with the memory options without which it would not fit."""
    scenario = Scenario(config, config.request("rehearsed"), Degrees(), world, gpu)
    found = first_that_fits(scenario)
    return Fit(None, {}) if found is None else Fit(found.rehearsal.peak, {**found.changes})


@dataclass(frozen=True, slots=True)
class Component:
    """A part of a model: its name, number of parameters, their dtypes, and its files."""

    name: str
    parameters: int
    dtypes: list[str]
    files: list[str]


@dataclass(frozen=True, slots=True)
class ModelFindings:
    """What a model is, and the files that it is read from.

    Attributes:
        source: what the user gave.
        pipeline, revision: its kind, and the digest or commit of its files.
        components: its parts.
    """

    source: str
    pipeline: str
    revision: str
    components: list[Component]


def examine_model(source: str, model: str | ModelFiles) -> ModelFindings:
    """Find out what a model is.

    Args:
        source: what the user gave.
        model: the model that it names.

    Raises:
        BadRequestError: it is missing, incomplete or not supported; the message says what was seen.
    """
    found = survey(model)
    pipeline = read_json(found.source / "model_index.json")["_class_name"]
    components = []
    for name in dict.fromkeys(file.name.split("/")[0] for file in found.files):
        weights = next(file.weights for file in found.files if file.name.startswith(f"{name}/"))
        stored = [weight.stored for weight in weights.values()]
        parameters = sum(math.prod(weight.shape) for weight in weights.values())
        dtypes, files = sorted({one.dtype for one in stored}), dict.fromkeys(str(one.file) for one in stored)
        components.append(Component(name, parameters, dtypes, [*files]))
    return ModelFindings(source, pipeline, found.revision, components)


def model_table(found: ModelFindings) -> Table:
    """Make a table of a model's components, and the files that they are read from."""
    title = f"{found.source}: a {found.pipeline}, {found.revision}"
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False)
    for name in ("component", "parameters", "dtypes"):
        table.add_column(name, no_wrap=True)
    table.add_column("read from", overflow="fold")
    for one in found.components:
        table.add_row(one.name, f"{one.parameters:,}", ", ".join(one.dtypes), "\n".join(one.files))
    return table
