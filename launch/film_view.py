"""What is seen of a film while it is made: shots × state × step × replica."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from launch.entries import Entry, State
from launch.film import Film
from launch.queue import Queue
from launch.status import COLOURS, written_seconds

_WIDTH, _RATE = 24, 4  # of a bar, in characters; refreshes per second


def film_table(film: Film, entries: Mapping[int, Entry]) -> Table:
    """The film as it stands.

    Args:
        entries: number of a shot → its request, for shots that are asked for.
    """
    table = Table(title=film.board.title)
    for column in ("shot", "state", "steps", "NFE", "left", "replica"):
        table.add_column(column, justify="right" if column in ("NFE", "left", "replica") else "left")
    done = 0
    for number, one in enumerate(film.shots):
        entry = entries.get(number)
        state = entry.state if entry is not None else State.DONE if film.done(number) else None
        done += state is State.DONE
        table.add_row(one.shot.id, *_cells(state, entry))
    table.caption = f"{done} of {len(film.shots)} shots"
    return table


def _cells(state: State | None, entry: Entry | None) -> tuple[Text | str | ProgressBar, ...]:
    if state is None:
        return "not wanted", "", "", "", ""
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
    """Show the film while the block runs, on a terminal.

    Args:
        requests: number of a shot → its number in the queue.
    """

    def table() -> Table:
        return film_table(film, {number: queue.entry(id) for number, id in requests.items()})

    if not console.is_terminal:
        yield
        return
    with Live(console=console, get_renderable=table, refresh_per_second=_RATE):
        yield
