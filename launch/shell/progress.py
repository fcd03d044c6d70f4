"""Shows progress on stderr: a bar on a terminal, an occasional line in a log."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from runtime.sampling.denoise import StepRecord
from spectrum import StepKind, TimeLeft

log = logging.getLogger(__name__)

_LINES_PER_RUN = 10
_VERBS = {StepKind.COMPUTE: "computed", StepKind.FORECAST: "forecast"}


class StepProgress:
    """Shows each step's kind, the evaluations so far, and the time left.

    Args:
        console: where to print; a bar if it is a terminal.
        label: name of the generation.
        kinds: the expected kind of every step.
    """

    def __init__(self, console: Console, label: str, kinds: Sequence[StepKind]):
        self._console, self._label, self._total = console, label, len(kinds)
        self._left = TimeLeft(kinds)
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=32),
            TextColumn("{task.completed:.0f}/{task.total:.0f}  {task.fields[status]}", markup=False),
            console=console,
        )
        self._task = self._bar.add_task(label, total=len(kinds), status="")

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def __call__(self, record: StepRecord) -> None:
        """Show one step."""
        self._left.add(record.index, record.kind, record.seconds)
        done, total = record.index + 1, self._total
        status = f"{_VERBS[record.kind]}  NFE {self._left.nfe}  ETA {self._left.seconds:.0f} s"
        self._bar.update(self._task, completed=done, status=status)
        if not self._console.is_terminal and (done == total or done % max(1, total // _LINES_PER_RUN) == 0):
            self._console.print(f"{self._label}: step {done}/{total}  {status}", soft_wrap=True)


@contextmanager
def timed(console: Console, doing: str) -> Iterator[None]:
    """Show what the block is doing, and afterwards how long it took."""
    started = time.perf_counter()
    with console.status(Text(doing)) if console.is_terminal else nullcontext():
        yield
    console.print(f"{doing}: {time.perf_counter() - started:.1f} s", soft_wrap=True)
