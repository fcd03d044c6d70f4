"""Shows a film while it is made: a row for each shot with state, steps and replica."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from launch.film.shots import Film
from launch.serve.entries import Entry, State
from launch.serve.queue import Queue, QueueError
from launch.serve.status import COLOURS, written_seconds

_WIDTH, _RATE = 24, 4  # width of a bar in characters; refreshes per second
_MOST = 40  # rows


def film_table(film: Film, entries: Mapping[int, Entry], made: Collection[int]) -> Table:
    """Make the table of a film's shots; of a long film, those around the shots being made.

    Args:
        entries: number of a shot → its request, for shots in the queue.
        made: shots that were done before.
    """
    table = Table(title=film.board.title)
    for column in ("shot", "state", "steps", "NFE", "left", "replica"):
        table.add_column(column, justify="right" if column in ("NFE", "left", "replica") else "left")
    states = [
        entries[number].state if number in entries else State.DONE if number in made else None
        for number in range(len(film.shots))
    ]
    open_ = [number for number, state in enumerate(states) if state in (State.RUNNING, State.WAITING)]
    first = max(0, min((open_ or [len(states)])[0] - _MOST // 4, len(states) - _MOST))
    for number in range(first, min(first + _MOST, len(states))):
        table.add_row(film.shots[number].shot.id, *_cells(states[number], entries.get(number)))
    table.caption = f"{states.count(State.DONE)} of {len(film.shots)} shots"
    return table


def _cells(state: State | None, entry: Entry | None) -> tuple[Text | str | ProgressBar, ...]:
    if state is None:
        return "not selected", "", "", "", ""
    shown = Text(str(state), style=COLOURS[state])
    if entry is None:
        return shown, "", "", "", ""
    told = entry.progress
    bar = ProgressBar(total=told.steps or 1, completed=told.step, width=_WIDTH) if told.steps else ""
    running = state is State.RUNNING
    left = written_seconds(told.seconds_left) if running and told.seconds_left is not None else ""
    where = "" if entry.replica is None else str(entry.replica)
    return shown, bar, str(told.nfe or ""), left, where


@contextmanager
def shown_live(console: Console, film: Film, queue: Queue, requests: Mapping[int, int]) -> Iterator[None]:
    """Show the table while the block runs, if the console is a terminal.

    Args:
        requests: number of a shot → its number in the queue.
    """
    if not console.is_terminal:
        yield
        return
    made = [number for number in range(len(film.shots)) if number not in requests and film.done(number)]
    shown = Table(title=film.board.title)

    def table() -> Table:
        nonlocal shown
        with suppress(QueueError):  # keep the last table; the pool reports such errors
            entries = {entry.id: entry for entry in queue.entries()}
            shown = film_table(film, {number: entries[id] for number, id in requests.items()}, made)
        return shown

    with Live(console=console, get_renderable=table, refresh_per_second=_RATE):
        yield
