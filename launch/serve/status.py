"""Tables that `lockstep status` shows of a queue."""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from launch.serve.entries import Entry, ReplicaEntry, State
from launch.serve.queue import Queue

COLOURS = {
    State.WAITING: "yellow",
    State.RUNNING: "cyan",
    State.DONE: "green",
    State.FAILED: "red",
    State.CANCELLED: "magenta",
}
_SHORT = ("no.", "prio", "state", "step", "NFE", "replica", "tries", "restarts")  # cells that never wrap
_SHOWN = 60  # characters of a prompt that are shown


def tables(queue: Queue, states: Sequence[str]) -> Iterator[Table | Text]:
    """Yield the table of the requests in these states, that of what they make, and the table of replicas; a
    line for an empty one."""
    title = ", ".join(f"{number} {state}" for state, number in queue.count().items())
    entries = queue.entries(*map(State, states))
    yield _table(title, [_row(entry) for entry in entries]) if entries else Text(title)
    if entries:
        yield _table("videos", [_video_row(entry) for entry in entries])
    replicas = [_replica_row(replica) for replica in queue.replicas()]
    yield _table("replicas", replicas) if replicas else Text("no replicas")


def _table(title: str, rows: Sequence[Mapping[str, str | Text]]) -> Table:
    """Make a table with a column for every key that has a value in some row."""
    names = [name for name in rows[0] if any(row[name] for row in rows)]
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in names:
        table.add_column(name, no_wrap=name in _SHORT, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) if isinstance(cell := row[name], str) else cell for name in names))
    return table


def _row(entry: Entry) -> dict[str, str | Text]:
    done, running = entry.progress, entry.state is State.RUNNING
    left = done.seconds_left if running else None
    return {
        "no.": str(entry.id),
        "name": entry.name,
        "owner": entry.owner,
        "prio": str(entry.priority or ""),
        "LoRA": entry.loras,
        "state": Text(entry.state, style=COLOURS[entry.state]),
        "step": f"{done.step}/{done.steps}" if done.steps else "",
        "NFE": str(done.nfe or ""),
        "time": _time(entry) if left is None else f"{written_seconds(left)} left",
        "replica": "" if entry.replica is None else str(entry.replica),
        "tries": str(entry.tries) if entry.tries > 1 else "",
        "preview": done.preview if running else "",
        "why": "" if running else entry.reason,
    }


def _video_row(entry: Entry) -> dict[str, str | Text]:
    """Beginning of a prompt, the preset and the path of the video; empty if another version wrote the job."""
    row: dict[str, str | Text] = {"no.": str(entry.id), "prompt": "", "preset": "", "out": ""}
    try:
        job = json.loads(entry.text)
        prompt, out = str(job["request"]["prompt"]), Path(job["outputs"]["video"])
        preset = str(job["request"]["spectrum"])
    except (ValueError, LookupError, TypeError, RecursionError):
        return row
    if preset.endswith((".yaml", ".yml")):
        preset = Path(preset).stem
    words = " ".join(prompt.split())
    shown = words if len(words) <= _SHOWN else f"{words[: _SHOWN - 1]}…"
    with suppress(OSError, ValueError):  # it is elsewhere
        out = out.relative_to(Path.cwd())
    return {**row, "prompt": shown, "preset": preset, "out": str(out)}


def _replica_row(replica: ReplicaEntry) -> dict[str, str | Text]:
    return {
        "replica": str(replica.number),
        "state": replica.state,
        "ranks": _places(replica),
        "restarts": str(replica.restarts),
    }


def _time(entry: Entry) -> str:
    """Format how long an ended request took, or the time until it expires; else empty."""
    if entry.started is not None and entry.ended is not None:
        return f"took {written_seconds(entry.ended - entry.started)}"
    if entry.deadline is not None and entry.ended is None:
        return f"at most {written_seconds(max(0.0, entry.deadline - time.time()))}"
    return ""


def written_seconds(seconds: float) -> str:
    """Format seconds as `12 s` or `1:40 min`; `?` for NaN and infinity."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d} min" if minutes else f"{rest} s"


def _places(replica: ReplicaEntry) -> str:
    """Format the ranks of a replica, one line per host: `0 (cuda:0), 1 (cuda:1) on host-a`."""
    by_host: dict[str, list[str]] = defaultdict(list)
    for place in replica.places:
        by_host[place["host"]].append(f"{place['rank']} ({place['device']})")
    return "\n".join(f"{', '.join(ranks)} on {host}" for host, ranks in by_host.items())
