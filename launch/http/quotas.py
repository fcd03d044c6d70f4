"""Quotas: how many requests may wait or run at a time, and how many an owner may make within an hour."""

from __future__ import annotations

import sqlite3
import time

from launch.http.errors import ApiError
from launch.http.keys import Key

HOUR = 3600.0
OPEN = "state IN ('waiting', 'running')"
_SOON = 30.0  # seconds after which a request may have ended


def check_quotas(base: sqlite3.Connection, key: Key, most: int, count: int = 1) -> None:
    """Refuse `count` more requests if they would be too many, within the transaction `base`.

    Args:
        most: requests of all owners that may wait or run at a time.

    Raises:
        ApiError: the queue or a quota would be exceeded. Clients are told not to try again if it can never
            hold as many.
    """
    total = _count(base, OPEN)
    if total + count > most:
        said = f"{total} requests wait or run, and the limit is {most}; try again later"
        raise _too_many("queue_full", said, _SOON if count <= most else None)
    if key.queued is not None and _count(base, f"{OPEN} AND owner = ?", key.owner) + count > key.queued:
        said = f"{key.queued} of your requests may wait or run at the same time; try again when one has ended"
        raise _too_many("quota_queued", said, _SOON if count <= key.queued else None)
    if key.per_hour is not None:
        now = time.time()
        query = "SELECT submitted FROM requests WHERE owner = ? AND submitted > ? ORDER BY submitted"
        times = base.execute(query, (key.owner, now - HOUR)).fetchall()
        if len(times) + count > key.per_hour:
            said = f"you made {len(times)} requests in the last hour, and your quota is {key.per_hour}"
            wait = times[0]["submitted"] + HOUR - now if times and count <= key.per_hour else None
            raise _too_many("quota_per_hour", said, wait)


def _count(base: sqlite3.Connection, which: str, *values: str) -> int:
    return int(base.execute(f"SELECT COUNT(*) FROM requests WHERE {which}", values).fetchone()[0])


def _too_many(code: str, said: str, wait: float | None) -> ApiError:
    return ApiError(429, code, said, retry_after=wait)
