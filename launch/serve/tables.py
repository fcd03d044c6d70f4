"""Tables of a queue's SQLite file, the query for the next request, and the suspects of a lost Ray.

`history` has the states of each request. `events` has these and what was told while it ran, of all requests
in one order, for whoever follows them. A request in `suspects` was running when Ray was lost and may be to
blame; its `uncounted` losses do not count against it yet, as other requests were running, too.
"""

from __future__ import annotations

import sqlite3

TABLES = """
CREATE TABLE IF NOT EXISTS requests (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    owner TEXT NOT NULL,
    priority INTEGER NOT NULL,
    job TEXT NOT NULL,
    kind TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('waiting', 'running', 'done', 'failed', 'cancelled')),
    reason TEXT NOT NULL DEFAULT '',
    kills INTEGER NOT NULL DEFAULT 0,
    tries INTEGER NOT NULL DEFAULT 0,
    unwanted INTEGER NOT NULL DEFAULT 0,
    submitted REAL NOT NULL,
    deadline REAL,
    started REAL,
    ended REAL,
    replica INTEGER,
    progress TEXT NOT NULL DEFAULT '{}'
);
CREATE TABLE IF NOT EXISTS history (
    request INTEGER NOT NULL REFERENCES requests (id),
    state TEXT NOT NULL,
    reason TEXT NOT NULL,
    at REAL NOT NULL
);
CREATE UNIQUE INDEX IF NOT EXISTS ends_once
    ON history (request) WHERE state IN ('done', 'failed', 'cancelled');
CREATE TABLE IF NOT EXISTS events (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    request INTEGER NOT NULL REFERENCES requests (id),
    kind TEXT NOT NULL CHECK (kind IN ('state', 'begun', 'step', 'preview')),
    told TEXT NOT NULL,
    at REAL NOT NULL
);
CREATE INDEX IF NOT EXISTS events_by_request ON events (request, seq);
CREATE TABLE IF NOT EXISTS outputs (
    path TEXT NOT NULL,
    request INTEGER NOT NULL REFERENCES requests (id)
);
CREATE INDEX IF NOT EXISTS outputs_by_path ON outputs (path);
CREATE TABLE IF NOT EXISTS suspects (
    request INTEGER PRIMARY KEY REFERENCES requests (id),
    uncounted INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS replicas (
    number INTEGER PRIMARY KEY,
    state TEXT NOT NULL,
    places TEXT NOT NULL DEFAULT '[]',
    restarts INTEGER NOT NULL DEFAULT 0
);
"""

GROUP = 16  # characters of a request's `kind` that say which rank group can run it; the others, which LoRAs

NEXT = f"""
WITH used AS (
    SELECT owner,
        SUM(state = 'running') AS running,
        SUM(CASE WHEN started IS NULL THEN 0
            ELSE MAX(0, COALESCE(ended, :now) - MAX(started, :now - :memory)) END) AS seconds
    FROM requests GROUP BY owner
), next AS (
    SELECT requests.* FROM requests JOIN used USING (owner)
    WHERE state = 'waiting'
    ORDER BY priority DESC, used.running, CAST(used.seconds AS INTEGER),
        substr(kind, 1, {GROUP}) != substr(:loaded, 1, {GROUP}), kind != :loaded, id
    LIMIT 1
), at_work AS (
    SELECT id FROM requests WHERE state = 'running'
)
SELECT next.* FROM next
WHERE NOT EXISTS (SELECT 1 FROM at_work JOIN suspects ON request = at_work.id)
    AND NOT (EXISTS (SELECT 1 FROM at_work) AND EXISTS (SELECT 1 FROM suspects WHERE request = next.id))
"""
"""Selects the next request: highest priority; then the owner with the fewest running requests, then the least
recent use; then what the replica has already loaded, first what needs no other LoRAs; then submission order.
A suspect runs alone: nothing is selected while one runs, and it is selected only when nothing runs."""


def suspect(base: sqlite3.Connection, id: int, *, alone: bool) -> None:
    """Record that Ray was lost while a request ran; if it ran `alone`, this and earlier losses count."""
    known = base.execute("SELECT uncounted FROM suspects WHERE request = ?", (id,)).fetchone()
    losses = 1 + (known["uncounted"] if known else 0)
    base.execute("INSERT OR REPLACE INTO suspects VALUES (?, ?)", (id, 0 if alone else losses))
    if alone:
        base.execute("UPDATE requests SET kills = kills + ? WHERE id = ?", (losses, id))
