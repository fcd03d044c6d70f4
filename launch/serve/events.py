"""What happens while a pool serves a queue: one line per event for people, and records for followers."""

from __future__ import annotations

import json

from rich.console import Console

from launch.cluster.group import Begun, Ended, Event, Previewed, RankGroup
from launch.serve.entries import Entry, Progress, RunEvent
from launch.shell.terminal import insist, say


def print_event(console: Console, entry: Entry, event: Event | Ended, group: RankGroup) -> None:
    """Print a line when a generation begins or a request ends, and one for each warning of its report."""
    warnings: list[str] = []
    if isinstance(event, Begun):
        what = f"begins ({event.label}), try {entry.tries}"
    elif isinstance(event, Ended):
        what = f"{event.end}: {event.reason}" if event.reason else str(event.end)
        warnings = json.loads(event.report)["warnings"] if event.report else []
    else:
        return
    say(console, f"{entry.name}: {what}")
    for warning in warnings:
        insist(console, f"{entry.name}: warning: {warning}")


def run_event(event: Event, progress: Progress) -> RunEvent:
    """Make the record of an event.

    Args:
        progress: of the request, after the event.
    """
    if isinstance(event, Begun):
        kinds = "".join(str(kind)[0] for kind in event.kinds)  # c: computed, f: forecast
        return RunEvent("begun", {"label": event.label, "kinds": kinds})
    if isinstance(event, Previewed):
        return RunEvent("preview", {"step": progress.step, "steps": progress.steps})
    left = progress.seconds_left
    told = {"step": progress.step, "steps": progress.steps, "kind": str(event.kind), "seconds": event.seconds}
    return RunEvent("step", {**told, "error": event.error, "nfe": progress.nfe, "seconds_left": left})
