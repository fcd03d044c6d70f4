"""Webhook messages that are yet to be delivered, stored beside the events that they report."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from launch.http.event_records import VIDEO_OF_REQUEST
from launch.serve.entries import State
from launch.serve.queue import Queue

_TABLES = """
CREATE TABLE IF NOT EXISTS deliveries (
    event INTEGER NOT NULL,
    url TEXT NOT NULL,
    owner TEXT NOT NULL,
    video TEXT NOT NULL,
    state TEXT NOT NULL,
    at REAL NOT NULL,
    tries INTEGER NOT NULL DEFAULT 0,
    next REAL NOT NULL DEFAULT 0,
    PRIMARY KEY (event, url)
);
CREATE TABLE IF NOT EXISTS collected (event INTEGER NOT NULL)
"""


Address = tuple[str, str]
"""An owner, and the URL that is to be told."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """A webhook message to one address.

    Attributes:
        event: number of the event that it reports.
        tries: attempts so far.
    """

    event: int
    url: str
    owner: str
    video: str
    state: State
    at: float
    tries: int

    @property
    def address(self) -> Address:
        """To whom it goes."""
        return self.owner, self.url

    @property
    def id(self) -> str:
        """Id of the message, the same at every attempt."""
        return f"evt_{self.event}"


class Deliveries:
    """Webhook deliveries of a queue; several servers may share them."""

    def __init__(self, queue: Queue):
        self._queue = queue
        with queue.transaction() as base:
            for statement in _TABLES.split(";"):
                base.execute(statement)
            if base.execute("SELECT 1 FROM collected").fetchone() is None:  # what was before is old news
                base.execute("INSERT INTO collected SELECT COALESCE(MAX(seq), 0) FROM events")

    def collect(self, targets: Mapping[str, Mapping[str, Any]]) -> None:
        """Store a delivery for each video that has ended since the last call.

        Args:
            targets: owner → addresses (keys of the inner mapping).
        """
        newest = self._queue.last_event()
        [last] = self._queue.read(lambda row: int(row[0]), "SELECT event FROM collected")
        if newest == last:
            return
        ended = (
            "SELECT seq, json_extract(told, '$.state') AS state, at, videos.id AS video, videos.owner "
            f"FROM events {VIDEO_OF_REQUEST} WHERE seq > ? AND seq <= ? AND events.kind = 'state' "
            "AND json_extract(told, '$.state') IN ('done', 'failed', 'cancelled') AND NOT videos.deleted"
        )
        with self._queue.transaction() as base:
            last = base.execute("SELECT event FROM collected").fetchone()["event"]
            for row in base.execute(ended, (last, newest)).fetchall():
                base.executemany(
                    "INSERT OR IGNORE INTO deliveries (event, url, owner, video, state, at) "
                    "VALUES (?, ?, ?, ?, ?, ?)",
                    [
                        (row["seq"], url, row["owner"], row["video"], row["state"], row["at"])
                        for url in targets.get(row["owner"], ())
                    ],
                )
            base.execute("UPDATE collected SET event = MAX(event, ?)", (newest,))

    def due(self, *, lease: float, limit: int, lanes: int, busy: Collection[Address]) -> list[Delivery]:
        """Take deliveries that are due now; no other server gets them for `lease` seconds.

        Args:
            limit: deliveries to one address.
            lanes: addresses; those that have waited longest come first.
            busy: addresses that get none now.
        """
        now = time.time()
        if not self._queue.read(tuple, "SELECT 1 FROM deliveries WHERE next <= ? LIMIT 1", now):
            return []
        addresses = "SELECT owner, url FROM deliveries WHERE next <= ? GROUP BY owner, url ORDER BY MIN(next)"
        oldest = (
            "SELECT * FROM deliveries WHERE owner = ? AND url = ? AND next <= ? ORDER BY next, event LIMIT ?"
        )
        with self._queue.transaction() as base:
            waiting = [(row["owner"], row["url"]) for row in base.execute(addresses, (now,))]
            found = [
                _read(row)
                for owner, url in [one for one in waiting if one not in busy][:lanes]
                for row in base.execute(oldest, (owner, url, now, limit)).fetchall()
            ]
            base.executemany(
                "UPDATE deliveries SET next = ? WHERE event = ? AND url = ?",
                [(now + lease, one.event, one.url) for one in found],
            )
        return found

    def done(self, delivery: Delivery) -> None:
        """Remove a delivery that succeeded or is given up."""
        with self._queue.transaction() as base:
            base.execute("DELETE FROM deliveries WHERE event = ? AND url = ?", (delivery.event, delivery.url))

    def later(self, delivery: Delivery, seconds: float) -> None:
        """Postpone a delivery that failed by some seconds."""
        with self._queue.transaction() as base:
            base.execute(
                "UPDATE deliveries SET tries = tries + 1, next = ? WHERE event = ? AND url = ?",
                (time.time() + seconds, delivery.event, delivery.url),
            )


def _read(row: sqlite3.Row) -> Delivery:
    return Delivery(
        row["event"], row["url"], row["owner"], row["video"], State(row["state"]), row["at"], row["tries"]
    )
