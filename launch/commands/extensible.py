"""Extensible group: a group of commands to which installed packages add their own."""

from __future__ import annotations

from importlib.metadata import entry_points

import click

from launch.commands.command import CommandGroup
from runtime.errors import BadRequestError
from runtime.files.extensions import COMMANDS, load_entry


class ExtensibleGroup(CommandGroup):
    """Group that also has the click commands which packages announce as entry points `lockstep.commands`.

    A command has the name of its entry point. Lockstep's own take precedence.
    """

    @property
    def added(self) -> list[str]:
        """Names of the commands that packages announce."""
        return sorted(entry_points(group=COMMANDS).names - self.commands.keys())

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*super().list_commands(ctx), *self.added]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        own = super().get_command(ctx, cmd_name)
        if own is not None or cmd_name not in self.added:
            return own
        added = load_entry(entry_points(group=COMMANDS)[cmd_name])
        if not isinstance(added, click.Command):
            raise BadRequestError(f"{COMMANDS}: {cmd_name!r} is {added!r}, not a click command")
        return added
