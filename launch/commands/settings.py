"""`lockstep config` and `lockstep preset`: show what a config or preset says in full, and their schemas.

Imports nothing slow.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from launch.commands.command import Command
from launch.commands.types import FileNameType
from runtime.errors import BadRequestError

if TYPE_CHECKING:
    from pydantic import BaseModel


@click.command(cls=Command, short_help="Show a config with all its defaults.")
@click.argument("config", required=False, type=FileNameType("."), metavar="[NAME|FILE]")
@click.option(
    "--model",
    type=FileNameType(),
    metavar="FOLDER|REPOSITORY",
    help="Model to use instead of the config's; without a config, its usual config is shown.",
)
@click.option("--revision", metavar="NAME", help="Commit or tag of the model's repository.")
@click.option("--schema", is_flag=True, help="Print the JSON schema of config files instead.")
def config(config: str | None, model: str | None, revision: str | None, schema: bool) -> None:
    """Print a config as YAML, with the default of every field that it leaves out.

    NAME is a shipped config and FILE is your own; the default is wan-tiny, or the usual one for --model.
    The output is itself a config: docs/configs.md.
    """
    from runtime.models.configs import open_config
    from runtime.request.config import Config

    if schema:
        if config or model or revision:
            raise BadRequestError("schema: it is the same for all configs; give no name")
        _print_schema(Config)
        return
    _print_yaml(open_config(config, model=model, revision=revision).model_dump(mode="json"))


@click.command(cls=Command, short_help="Show a forecasting preset with all its defaults.")
@click.argument("preset", required=False, type=FileNameType("spectrum"), metavar="[NAME|FILE]")
@click.option("--schema", is_flag=True, help="Print the JSON schema of preset files instead.")
def preset(preset: str | None, schema: bool) -> None:
    """Print a forecasting preset as YAML, with the default of every field that it leaves out.

    NAME is a shipped preset and FILE is your own; the default is paper. The output is itself a preset:
    docs/presets.md.
    """
    from runtime.forecasting.presets import Preset, load_preset

    if schema:
        if preset:
            raise BadRequestError("schema: it is the same for all presets; give no name")
        _print_schema(Preset)
        return
    _print_yaml(load_preset(preset or "paper").model_dump(mode="json"))


def _print_schema(model: type[BaseModel]) -> None:
    click.echo(json.dumps(model.model_json_schema(), indent=2))


def _print_yaml(content: Mapping[str, Any]) -> None:
    import yaml

    click.echo(yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True, width=100), nl=False)
