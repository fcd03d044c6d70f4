"""Sections of `lockstep --help`: commands listed by purpose. Imports nothing slow."""

from __future__ import annotations

import click

_SECTIONS = {
    "Make videos": ("generate", "storyboard"),
    "Serve many requests": ("queue", "status"),
    "Measure and plan": ("compare", "calibrate", "plan", "rehearse"),
}
_OTHERS = "This machine"


class Sections(click.Group):
    """A group whose help lists its commands by purpose."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        placed = [name for names in _SECTIONS.values() for name in names]
        others = [name for name in self.list_commands(ctx) if name not in placed]
        width = max(map(len, self.commands))
        for title, names in [*_SECTIONS.items(), (_OTHERS, others)]:
            with formatter.section(title):
                formatter.write_dl(
                    [
                        (name.ljust(width), self.commands[name].get_short_help_str(formatter.width))
                        for name in names
                    ]
                )
