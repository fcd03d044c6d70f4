"""What people read: text as it is, on any terminal.

Names, titles and paths are users' own. None of them is taken for markup, none commands a terminal, and a
character that the terminal's encoding lacks is spelled out.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import click
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from runtime.errors import JobFailedError

# Control characters but tab and line feed, those that turn the direction of text, and what no encoding has.
_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    r"""`text` with everything that a terminal would obey instead of showing spelled out, such as `\x1b`."""
    return _INVISIBLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class Terminal(Console):
    """A console whose strings are text: no markup, no emoji codes, no highlighting, no control characters.

    Styles are given with `rich.text.Text`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def on_broken_pipe(self) -> None:
        """Let whoever prints know; rich would end the process."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            text, style, control = segment
            if control or not _INVISIBLE.search(text):
                yield segment
            else:
                yield Segment(visible(text), style)


def say(console: Console, message: str) -> None:
    """Print a message as it is, on one line however long it is; on any console."""
    console.print(message, markup=False, highlight=False, soft_wrap=True)


def forgive_encodings() -> None:
    """Let the process's streams spell out characters that their encoding lacks."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):  # it is closed, or a test's
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def print_path(path: str | os.PathLike[str]) -> None:
    """A result's path alone on stdout: for programs exactly as the system has it.

    Raises:
        JobFailedError: it cannot be written there; nobody listening any more is no failure.
    """
    try:
        if sys.stdout is not None and sys.stdout.isatty():
            print(visible(os.fspath(path)))
        else:
            click.echo(os.fsencode(path))
    except OSError as error:
        said = f"stdout: cannot tell the result's path, {os.fspath(path)!r}, which is there: {error.strerror}"
        raise JobFailedError(said) from error
