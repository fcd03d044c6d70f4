"""Events in the lives of videos, as the queue has stored them."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import dataclass
from typing import Any

from launch.http.records import SEEN, new_id
from launch.serve.queue import Queue

# An event's request is named after its video, with a number if the video was resumed.
VIDEO_OF_REQUEST = (
    "JOIN requests ON requests.id = events.request "
    f"JOIN videos ON videos.id = substr(requests.name, 1, {len(new_id())})"
)


@dataclass(frozen=True, slots=True)
class Event:
    """An event in the life of a video.

    Attributes:
        number: its place in the order of all events.
        kind: `state`, `begun`, `step` or `preview`.
        told: its data.
    """

    number: int
    kind: str
    told: dict[str, Any]
    at: float
    video: str


def read_events(queue: Queue, owner: str, *, after: int, video: str | None, limit: int) -> list[Event]:
    """Events of an owner's videos, or of one of them, in order.

    Args:
        after: number of the last event that was seen.
    """
    of_one = "" if video is None else "AND videos.id = ?"
    query = (
        "SELECT seq, events.kind AS kind, told, at, videos.id AS video FROM events "
        f"{VIDEO_OF_REQUEST} WHERE seq > ? AND {SEEN} {of_one} ORDER BY seq LIMIT ?"
    )
    chosen = () if video is None else (video,)
    return queue.read(_read, query, after, owner, *chosen, limit)


def _read(row: sqlite3.Row) -> Event:
    return Event(row["seq"], row["kind"], json.loads(row["told"]), row["at"], row["video"])
