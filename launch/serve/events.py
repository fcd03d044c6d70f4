"""What a pool says while it serves a queue: a line for each thing that happens to a request."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console

from launch.cluster.group import Begun, Ended
from launch.shell.terminal import say


def print_event(console: Console, entry: Any, event: Any, group: Any) -> None:
    """A line where a generation begins, and where a request ends, with one for each of its warnings."""
    warnings: list[str] = []
    if isinstance(event, Begun):
        what = f"begins ({event.label}), try {entry.tries}"
    elif isinstance(event, Ended):
        what = f"{event.end} {event.reason}"
        warnings = json.loads(event.report)["warnings"] if event.report else []
    else:
        return
    for line in (what, *(f"warning: {warning}" for warning in warnings)):
        say(console, f"{entry.name}: {line}")
