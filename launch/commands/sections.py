"""Sections of `lockstep --help`: commands listed by purpose. Imports nothing slow."""

from __future__ import annotations

import click

from launch.commands.extensible import ExtensibleGroup
from runtime.errors import BadRequestError

_SECTIONS = {
    "Make videos": ("generate", "storyboard"),
    "Serve many requests": ("queue", "status", "serve", "keys"),
    "Measure and plan": ("compare", "calibrate", "plan", "rehearse"),
}
_OTHERS, _ADDED = "Models and this machine", "Added by packages"


class Sections(ExtensibleGroup):
    """A group whose help lists its commands by purpose, and those that packages add."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        placed = [name for names in _SECTIONS.values() for name in names]
        others = sorted(self.commands.keys() - {*placed})
        added = [(_ADDED, self.added)] if self.added else []
        width = max(map(len, self.list_commands(ctx)))
        for title, names in [*_SECTIONS.items(), (_OTHERS, others), *added]:
            listed = [(name.ljust(width), self._short_help(ctx, name, formatter.width)) for name in names]
            with formatter.section(title):
                formatter.write_dl(listed)

    def _short_help(self, ctx: click.Context, name: str, width: int) -> str:
        """Return a command's short help, or why its package cannot be imported."""
        try:
            command = self.get_command(ctx, name)
        except BadRequestError as error:
            return str(error)
        return "" if command is None else command.get_short_help_str(width)
