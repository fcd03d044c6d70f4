"""`lockstep convert`: makes a folder in diffusers layout of a model in any layout that is read."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console

from launch.commands.command import Command
from launch.commands.types import FileNameType, PathType
from launch.shell.exits import advising
from launch.shell.terminal import print_path


@click.command(cls=Command, short_help="Convert a model in another layout to diffusers layout.")
@click.argument("source", type=FileNameType(), metavar="SRC")
@click.argument("folder", type=PathType(), metavar="DST")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Dtype of the transformers' and the text encoder's weights.  [default: unchanged]",
)
@click.pass_obj
def convert(console: Console, /, source: str, folder: Path, dtype: str | None) -> None:
    """Convert the model SRC to diffusers layout in the new folder DST, tensor by tensor, and verify it.

    SRC is a folder or repository in diffusers layout or in that of Wan's own repositories, or a YAML config
    whose `model` names the files of components, such as ComfyUI's: docs/models.md. DST appears when it is
    complete. After an interruption, the same command continues from the finished files.
    """
    from launch.commands.model_source import model_of
    from runtime.models.layouts.target import check_new

    model = model_of(source)
    check_new(folder)
    from launch.commands.conversion import plan, run

    conversion = plan(model, folder, dtype)
    with advising(lambda: "the same command continues from the files that are finished"):
        run(conversion, console)
    print_path(folder)
