"""Prints what happens while a pool serves a queue, one line per event."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console

from launch.cluster.group import Begun, Ended
from launch.shell.terminal import say


def print_event(console: Console, entry: Any, event: Any, group: Any) -> None:
    """Print a line when a generation begins or a request ends, and one for each warning of its report."""
    warnings: list[str] = []
    if isinstance(event, Begun):
        what = f"begins ({event.label}), try {entry.tries}"
    elif isinstance(event, Ended):
        what = f"{event.end} {event.reason}".rstrip()
        warnings = json.loads(event.report)["warnings"] if event.report else []
    else:
        return
    for line in (what, *(f"warning: {warning}" for warning in warnings)):
        say(console, f"{entry.name}: {line}")
