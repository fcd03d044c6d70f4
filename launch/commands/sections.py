"""Sections of `lockstep --help`: commands listed by purpose. Imports nothing slow."""

from __future__ import annotations

import click

from launch.commands.extensible import ExtensibleGroup

_SECTIONS = {
    "Make videos": ("generate", "storyboard"),
    "Serve many requests": ("queue", "status", "serve", "keys"),
    "Measure and plan": ("compare", "calibrate", "plan", "rehearse"),
}
_OTHERS, _ADDED = "This machine", "Added by packages"


class Sections(ExtensibleGroup):
    """A group whose help lists its commands by purpose, and those that packages add."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        placed = [name for names in _SECTIONS.values() for name in names]
        others = sorted(self.commands.keys() - {*placed})
        added = [(_ADDED, self.added)] if self.added else []
        width = max(map(len, self.list_commands(ctx)))
        for title, names in [*_SECTIONS.items(), (_OTHERS, others), *added]:
            known = [(name, self.get_command(ctx, name)) for name in names]
            with formatter.section(title):
                formatter.write_dl(
                    [(n.ljust(width), one.get_short_help_str(formatter.width)) for n, one in known if one]
                )
