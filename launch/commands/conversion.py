"""What `lockstep convert` does: checks what is to be converted, converts it, and shows progress."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from launch.shell.terminal import say
from runtime.models.layouts.convert import Conversion, plan_conversion
from runtime.request.config import ModelFiles

_APART = 10.0  # seconds between two lines in a log


def plan(model: str | ModelFiles, folder: Path, dtype: str | None) -> Conversion:
    """Check what is to be converted, and where to.

    Args:
        model: a folder or repository, or the files of components.
        folder: folder that is to be made.
        dtype: dtype of the transformers' and the text encoder's weights; None keeps each as it is.

    Raises:
        BadRequestError: the model is missing, incomplete or not supported, or the folder cannot be made.
    """
    conversion = plan_conversion(model, folder, dtype=dtype)
    if not conversion.target.is_done():
        conversion.target.check()
    return conversion


def run(conversion: Conversion, console: Console) -> None:
    """Convert, and show progress; nothing is done if it was done before."""
    folder = conversion.target.folder
    if conversion.target.is_done():
        say(console, f"{folder} exists already, converted from the same files")
        return
    with ConversionProgress(console, conversion.size) as progress:
        conversion.run(progress)


class ConversionProgress:
    """Shows which file is written or verified, and how far all are.

    Args:
        console: where to print; a bar if it is a terminal, otherwise a line now and then.
        total: bytes of all weights.
    """

    def __init__(self, console: Console, total: int):
        self._console, self._told = console, time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=32),
            DownloadColumn(binary_units=True),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._bar.add_task("converting", total=total)

    def __enter__(self) -> ConversionProgress:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def __call__(self, doing: str, done: int, total: int) -> None:
        """Show how far it is; see `runtime.models.layouts.convert.OnProgress`."""
        self._bar.update(self._task, description=doing, completed=done, total=total)
        now = time.monotonic()
        if not self._console.is_terminal and (done == total or now - self._told >= _APART):
            self._told = now
            say(self._console, f"{doing}: {done / 2**30:.2f} of {total / 2**30:.2f} GiB")
