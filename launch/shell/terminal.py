"""Prints text as it is, on any terminal.

Names, titles and paths are the user's. None is interpreted as markup or as terminal control codes, and
characters that the terminal's encoding lacks are escaped.
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

from runtime.errors import JobFailedError, reason

# Control characters except tab and line feed, text direction marks, and surrogates, which no encoding has.
_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    r"""Escape everything that a terminal would obey instead of showing, such as `\x1b`."""
    return _INVISIBLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def counted(number: int, noun: str) -> str:
    """Write a number of things: `1 shot`, `2 shots`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


class Terminal(Console):
    """A console that prints strings as plain text: no markup, emoji, highlighting or control characters.

    Styles are given with `rich.text.Text`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def on_broken_pipe(self) -> None:
        """Raise BrokenPipeError; rich itself would end the process."""
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
    """Print a message unchanged and unwrapped on any console."""
    console.print(message, markup=False, highlight=False, soft_wrap=True)


def insist(console: Console, message: str) -> None:
    """Print a message as `say` does, also on a console that is quiet."""
    before, console.quiet = console.quiet, False
    try:
        say(console, message)
    finally:
        console.quiet = before


def forgive_encodings() -> None:
    """Let the standard streams escape characters that their encoding lacks."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):  # closed, or replaced by a test
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def print_path(path: str | os.PathLike[str]) -> None:
    """Print a result's path alone on stdout; to programs byte for byte as the file system has it.

    Raises:
        JobFailedError: stdout cannot be written; a reader that is gone is no failure.
    """
    try:
        if sys.stdout is not None and sys.stdout.isatty():
            print(visible(os.fspath(path)))
        else:
            click.echo(os.fsencode(path))
    except OSError as error:
        raise JobFailedError(
            f"stdout: cannot print the path of the result, {os.fspath(path)!r}, which is written: "
            f"{reason(error)}"
        ) from error
