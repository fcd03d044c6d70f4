"""Types of command-line options. Imports nothing slow."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from runtime.files.text import user_path

DEGREE = click.IntRange(min=1, max=65536)


class NumberType(click.ParamType[float]):
    """A finite number within bounds, both inclusive; others are refused with their value and the bounds."""

    name = "number"

    def __init__(self, least: float, most: float):
        self._least, self._most = least, most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = math.nan
        if not self._least <= number <= self._most:  # NaN fails both comparisons
            self.fail(
                f"{str(value)[:60]!r} given; a number from {self._least:g} to {self._most:g} is needed",
                param,
                ctx,
            )
        return number


class PathType(click.ParamType[Path]):
    """Path of a file or folder; empty ones are refused, as they mostly come from unset variables."""

    name = "path"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        return _files(incomplete)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        if value == "":
            self.fail("'' given; a name is needed", param, ctx)
        path = user_path(str(value))
        first = path.parts[0] if len(path.parts) > 1 else ""
        if first.startswith("~"):  # a folder of this name would be made
            self.fail(
                f"{str(value)!r} given; no user's home folder is {first!r}; for a folder of that name give "
                f"{'./' + str(value)!r}",
                param,
                ctx,
            )
        return path


class FileNameType(click.ParamType[str]):
    """Name of something shipped, or path of a file; expands the `~` of `--option=~/file`, too.

    Args:
        folder: folder of `configs/` with the shipped files, whose names a shell can complete.
    """

    name = "text"

    def __init__(self, folder: str | None = None):
        self._folder = folder

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        from runtime.request.config import available

        names = [] if self._folder is None else available(self._folder)
        found = [CompletionItem(name) for name in names if name.startswith(incomplete)]
        return found or _files(incomplete)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return str(user_path(value)) if str(value).startswith("~") else str(value)


def _files(incomplete: str) -> list[CompletionItem]:
    """Let the shell complete the path of a file."""
    return [CompletionItem(incomplete, type="file")]


DAY = 86400.0  # seconds
SCALE = NumberType(-1000.0, 1000.0)  # scale of a LoRA
TIMEOUT = NumberType(1.0, 7 * DAY)  # seconds for `--timeout`
EXPIRY = NumberType(1.0, 3650 * DAY)  # seconds after which a request expires
PRICE = NumberType(0.0, 1e9)  # price of a rank for an hour
REPLICAS = click.IntRange(min=1, max=4096)
PRIORITY = click.IntRange(min=-1_000_000, max=1_000_000)
ID = click.IntRange(min=1, max=2**63 - 1)  # number of a request in a queue; SQLite's range


class SizeType(click.ParamType[tuple[int, int]]):
    """A size given as WIDTHxHEIGHT, in pixels."""

    name = "WIDTHxHEIGHT"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        found = re.fullmatch(r"([0-9]{1,9})[xX]([0-9]{1,9})", str(value))
        if found is None:
            self.fail(f"{value!r} is not WIDTHxHEIGHT, for example 832x480", param, ctx)
        return int(found[1]), int(found[2])


class BudgetsType(click.ParamType[tuple[int, ...]]):
    """Numbers of computed steps, such as 8,10,14; `none` for an empty list."""

    name = "N,N,…"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        if str(value) == "none":
            return ()
        if not re.fullmatch(r"[0-9]{1,4}(,[0-9]{1,4})*", str(value)):
            self.fail(f"{str(value)[:60]!r} given; numbers such as 8,10,14 are needed, or none", param, ctx)
        return tuple(int(number) for number in str(value).split(","))
