"""A queue of requests in a folder, which outlives every process that uses it.

It is one SQLite file. The pool that serves the queue holds its lock; any process may add, cancel and list
requests meanwhile. A request waits, then runs (and waits again if its rank group died), and ends once: done,
failed or cancelled.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, TypeVar

from launch.serve.entries import (
    EXPIRED,
    Entry,
    Progress,
    ReplicaEntry,
    RunEvent,
    State,
    read_entry,
    read_replica,
)
from launch.serve.kinds import kind_of
from launch.serve.tables import NEXT, TABLES, suspect
from runtime.errors import BadRequestError, JobFailedError, reason
from runtime.files.locks import hold
from runtime.jobs.job import Job

_Made = TypeVar("_Made")
_PATIENCE = 20.0  # seconds to wait for another process that writes
_LARGEST = 2**63 - 1  # largest integer in SQLite
_LONGEST = 10 * 365 * 86400.0  # seconds; upper bound of `expires`
_ADD_EVENT = "INSERT INTO events (request, kind, told, at) VALUES (?, ?, ?, ?)"
_MEMORY = 3600.0  # seconds for which an owner's use counts against them


class QueueError(JobFailedError):
    """The queue's file cannot be read or written now: the disk is full, or another process holds it. The
    transaction is rolled back, and the queue can be used again."""


class Queue:
    """Queue of requests in `folder`, created if there is none. Thread-safe.

    It uses SQLite's rollback journal: the write-ahead log does not work on a disk that machines share.

    Raises:
        BadRequestError: another file is in its place, or the folder cannot be written.
        QueueError: by every method, if the file cannot be read or written.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._lock = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._base = sqlite3.connect(
                folder / "queue.sqlite",
                timeout=_PATIENCE,
                isolation_level=None,  # transactions are explicit, see `transaction`
                check_same_thread=False,
            )
            self._base.row_factory = sqlite3.Row
            self._check_own()
            self._base.executescript(TABLES)
        except (OSError, ValueError, sqlite3.Error) as error:
            raise BadRequestError(f"queue: cannot use {str(folder)!r}: {reason(error)}") from None

    def _check_own(self) -> None:
        """Refuse a database that is not a queue, before anything is written to it."""
        tables = self._base.execute("SELECT 1 FROM sqlite_master WHERE type = 'table'").fetchall()
        columns = {row["name"] for row in self._base.execute("PRAGMA table_info(requests)")}
        if tables and not {"owner", "job", "kind", "state"} <= columns:
            self.close()
            file = str(self.folder / "queue.sqlite")
            raise BadRequestError(f"queue: {file!r} is not a queue's; choose another folder")

    def close(self) -> None:
        """Close the file."""
        self._base.close()

    @contextmanager
    def served(self, *, lost: bool = False) -> Iterator[None]:
        """Hold the queue's lock while it is served. Requests that ran when an earlier server died wait again.

        Args:
            lost: the earlier server's Ray was lost, which counts against a request that ran on it alone. Of
                several, any may be to blame: each runs alone from then on, and if Ray is lost again while one
                does, both losses count against it.

        Raises:
            BadRequestError: another process serves it, or the file `lock` is not the queue's.
        """
        with self._held():
            why = "the Ray driver process was lost" if lost else "the pool was interrupted"
            self._release(why, killed=lost)
            try:
                yield
            finally:
                self._release("the pool has stopped", killed=False)

    def _held(self) -> IO[str]:
        """Open the lock file and hold it until it is closed. A foreign file of this name is left alone."""
        path = self.folder / "lock"
        try:
            return hold(
                path,
                field="queue",
                said=lambda who: f"queue: another pool serves {str(self.folder)!r} ({who})",
            )
        except OSError as error:
            raise QueueError(f"queue: cannot lock {str(path)!r}: {reason(error)}") from error

    def _release(self, reason: str, *, killed: bool) -> None:
        with self.transaction() as base:
            base.execute("DELETE FROM replicas")
            running = [id for (id,) in base.execute("SELECT id FROM requests WHERE state = 'running'")]
            for id in running:
                if killed:
                    suspect(base, id, alone=len(running) == 1)
                _wait_again(base, id, reason)

    def submit(
        self,
        job: Job,
        *,
        name: str | None = None,
        owner: str = "",
        priority: int = 0,
        seconds: float | None = None,
    ) -> int:
        """Add a request and return its number.

        Args:
            job: checked, with absolute paths.
            name: unique, one line of text; by default made from its number.
            owner: owners of the same priority share the replicas fairly.
            priority: requests of higher priority run first.
            seconds: time after which the request expires, waiting or running.

        Raises:
            BadRequestError: the queue has a request of this name, one that has not ended will write one of
                the same files, or a value is out of bounds.
        """
        with self.transaction() as base:
            return self.insert(base, job, name=name, owner=owner, priority=priority, seconds=seconds)

    def insert(
        self,
        base: sqlite3.Connection,
        job: Job,
        *,
        name: str | None = None,
        owner: str = "",
        priority: int = 0,
        seconds: float | None = None,
    ) -> int:
        """Add a request as `submit` does, as a part of the transaction `base`."""
        check_line("name", name)
        if not -_LARGEST <= priority <= _LARGEST:
            raise BadRequestError(f"priority: {priority} given; it must fit into 64 bits")
        if seconds is not None and not 0 < seconds <= _LONGEST:  # NaN fails both
            raise BadRequestError(f"expires: {seconds} given; it must be above 0 and at most ten years")
        now = time.time()
        deadline = None if seconds is None else now + seconds
        files = [os.path.realpath(path) for path in written_by(job)]
        row = (name or "", owner, priority, job.to_json(), kind_of(job), now, deadline)
        try:
            id = base.execute(
                "INSERT INTO requests (name, owner, priority, job, kind, submitted, deadline, state) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, 'waiting')",
                row,
            ).lastrowid
        except sqlite3.IntegrityError:
            raise BadRequestError(f"name: {name!r} given; the queue has a request of this name") from None
        assert id is not None
        if name is None:
            base.execute("UPDATE requests SET name = ? WHERE id = ?", (f"request-{id}", id))
        self._check_free(base, files)
        base.executemany("INSERT INTO outputs VALUES (?, ?)", [(path, id) for path in files])
        _log(base, id, State.WAITING, "submitted")
        return id

    def _check_free(self, base: sqlite3.Connection, files: list[str]) -> None:
        """Refuse files that a request which has not ended will write, by whatever path they are named."""
        query = (
            "SELECT name FROM outputs JOIN requests ON id = request "
            "WHERE path = ? AND state IN ('waiting', 'running')"
        )
        for path in files:
            row = base.execute(query, (path,)).fetchone()
            if row is not None:
                raise BadRequestError(f"out: {path!r} given; {row['name']} will write it")

    def cancel(self, id: int) -> State:
        """Cancel a request: a waiting one ends now, a running one after a step, an ended one is unchanged.

        Returns:
            The state that it was in.

        Raises:
            BadRequestError: there is no request of this number.
        """
        with self.transaction() as base:
            return self.cancel_in(base, id)

    def cancel_in(self, base: sqlite3.Connection, id: int) -> State:
        """Cancel a request as `cancel` does, as a part of the transaction `base`."""
        known = -_LARGEST <= id <= _LARGEST
        row = base.execute("SELECT state FROM requests WHERE id = ?", (id if known else -1,)).fetchone()
        if row is None:
            raise BadRequestError(f"request: {id} given; the queue has no request of this number")
        state = State(row["state"])
        if state in (State.WAITING, State.RUNNING):
            base.execute("UPDATE requests SET unwanted = 1 WHERE id = ?", (id,))
        if state is State.WAITING:
            _change(base, id, State.CANCELLED, "cancelled while it waited")
        return state

    def forget_in(self, base: sqlite3.Connection, id: int) -> bool:
        """Remove a request that has ended, as a part of the transaction `base`; returns whether it is gone.

        The last one that was submitted stays, so that no number is given twice.
        """
        ended = "state NOT IN ('waiting', 'running') AND id < (SELECT MAX(id) FROM requests)"
        gone = base.execute(f"DELETE FROM requests WHERE id = ? AND {ended}", (id,)).rowcount > 0
        for table in ("history", "events", "outputs", "suspects") if gone else ():
            base.execute(f"DELETE FROM {table} WHERE request = ?", (id,))
        return gone

    def expire(self) -> None:
        """Cancel waiting requests whose deadline has passed."""
        with self.transaction() as base:
            late = "SELECT id FROM requests WHERE state = 'waiting' AND deadline < ?"
            for (id,) in base.execute(late, (time.time(),)).fetchall():
                _change(base, id, State.CANCELLED, f"{EXPIRED} while it waited")

    def take(self, replica: int, loaded: str = "") -> Entry | None:
        """Return the next request, now running on `replica`; None if none can start.

        Args:
            loaded: the `kind_of` the job that the replica's group ran last.
        """
        with self.transaction() as base:
            given = {"now": time.time(), "memory": _MEMORY, "loaded": loaded}
            row = base.execute(NEXT, given).fetchone()
            if row is None:
                return None
            base.execute(
                "UPDATE requests SET replica = ?, tries = tries + 1, started = COALESCE(started, ?), "
                "progress = '{}' WHERE id = ?",
                (replica, time.time(), row["id"]),
            )
            _change(base, row["id"], State.RUNNING, f"on replica {replica}")
            return read_entry(base.execute("SELECT * FROM requests WHERE id = ?", (row["id"],)).fetchone())

    def report(self, id: int, progress: Progress, events: Sequence[RunEvent] = ()) -> None:
        """Record the progress of a running request, and what happened since the last report."""
        now = time.time()
        with self.transaction() as base:
            told = json.dumps(asdict(progress))
            base.execute("UPDATE requests SET progress = ? WHERE id = ?", (told, id))
            rows = [(id, event.kind, json.dumps(event.told), now) for event in events]
            base.executemany(_ADD_EVENT, rows)

    def put_back(self, id: int, reason: str, *, killed: bool) -> None:
        """Let a running request wait again; one that was cancelled ends.

        Args:
            killed: whether its rank group crashed.
        """
        with self.transaction() as base:
            base.execute("UPDATE requests SET kills = kills + ? WHERE id = ?", (killed, id))
            _wait_again(base, id, reason)

    def end(self, id: int, state: State, reason: str = "") -> None:
        """End a running request as done, failed or cancelled."""
        with self.transaction() as base:
            _change(base, id, state, reason)

    def entry(self, id: int) -> Entry:
        """Return the request with this number, of which there is one."""
        return self.read(read_entry, "SELECT * FROM requests WHERE id = ?", id)[0]

    def find(self, id: int) -> Entry | None:
        """Return the request with this number; None if there is none, or it was forgotten."""
        return next(iter(self.read(read_entry, "SELECT * FROM requests WHERE id = ?", id)), None)

    def entries(self, *states: State) -> list[Entry]:
        """Return requests in the order of submission; all, or those in one of `states`."""
        wanted = states or tuple(State)
        query = f"SELECT * FROM requests WHERE state IN ({', '.join('?' * len(wanted))}) ORDER BY id"
        return self.read(read_entry, query, *wanted)

    def count(self) -> dict[State, int]:
        """Return the number of requests in each state."""
        query = "SELECT state, COUNT(*) FROM requests GROUP BY state"
        return dict.fromkeys(State, 0) | dict(self.read(lambda row: (State(row[0]), row[1]), query))

    def history(self, id: int) -> list[tuple[State, str, float]]:
        """Return each state that a request has been in, with the reason and the time."""
        query = "SELECT state, reason, at FROM history WHERE request = ? ORDER BY rowid"
        return self.read(lambda row: (State(row[0]), row[1], row[2]), query, id)

    def last_event(self) -> int:
        """Return the number of the last event of all requests; 0 if there is none."""
        given = "SELECT seq FROM sqlite_sequence WHERE name = 'events'"  # the last may have been forgotten
        return next(iter(self.read(lambda row: int(row[0]), given)), 0)

    def show_replica(self, replica: ReplicaEntry) -> None:
        """Record the state of a replica, for `replicas`."""
        row = (replica.number, replica.state, json.dumps(replica.places), replica.restarts)
        with self.transaction() as base:
            base.execute("INSERT OR REPLACE INTO replicas VALUES (?, ?, ?, ?)", row)

    def replicas(self) -> list[ReplicaEntry]:
        """Return the replicas that serve the queue now."""
        return self.read(read_replica, "SELECT * FROM replicas ORDER BY number")

    def read(self, make: Callable[[sqlite3.Row], _Made], query: str, *values: object) -> list[_Made]:
        """Run a query, and return `make` of each row."""
        with self._lock, self._explained("read"):
            return [make(row) for row in self._base.execute(query, values)]

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Run the block as one transaction, with no other writer meanwhile."""
        with self._lock, self._explained("write"):
            self._base.execute("BEGIN IMMEDIATE")
            try:
                yield self._base
                self._base.execute("COMMIT")  # may fail, too: disk full, or a reader that holds its lock
            except BaseException:
                if self._base.in_transaction:
                    with suppress(sqlite3.Error):  # report the original error
                        self._base.execute("ROLLBACK")
                raise

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        file = str(self.folder / "queue.sqlite")
        try:
            yield
        except sqlite3.Error as error:
            raise QueueError(f"queue: cannot {what} {file!r}: {reason(error)}") from error
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            # A row that Lockstep did not write.
            raise QueueError(f"queue: {file!r} is damaged ({reason(error)}); give another folder") from error


def check_line(field: str, text: str | None) -> None:
    """Refuse a text that cannot be shown as a name.

    Raises:
        BadRequestError: it is empty, too long, or has unprintable characters.
    """
    if text is not None and not (text.strip() and len(text) <= 200 and text.isprintable()):
        raise BadRequestError(f"{field}: {text!r} given; it must be one line of at most 200 characters")


def written_by(job: Job) -> list[Path]:
    """Return all files that a job writes, the videos first."""
    outputs, count = job.outputs, job.request.videos
    return [*dict.fromkeys([*outputs.videos(count), *outputs.touched(count)])]


def _change(base: sqlite3.Connection, id: int, state: State, reason: str) -> None:
    """Move a request that has not ended to another state."""
    ended = None if state in (State.WAITING, State.RUNNING) else time.time()
    changed = base.execute(
        "UPDATE requests SET state = ?, reason = ?, ended = ? "
        "WHERE id = ? AND state IN ('waiting', 'running')",
        (state, reason, ended, id),
    ).rowcount
    if not changed:
        raise RuntimeError(f"request {id} has ended already and cannot be {state}")
    _log(base, id, state, reason)


def _wait_again(base: sqlite3.Connection, id: int, reason: str) -> None:
    """Let a request that does not run any more wait, or end it if nobody wants it."""
    row = base.execute("SELECT unwanted FROM requests WHERE id = ?", (id,)).fetchone()
    if row is not None and row["unwanted"]:
        _change(base, id, State.CANCELLED, f"cancelled; {reason}")
    else:
        _change(base, id, State.WAITING, reason)


def _log(base: sqlite3.Connection, id: int, state: State, reason: str) -> None:
    now = time.time()
    base.execute("INSERT INTO history VALUES (?, ?, ?, ?)", (id, state, reason, now))
    base.execute(_ADD_EVENT, (id, "state", json.dumps({"state": state, "reason": reason}), now))
