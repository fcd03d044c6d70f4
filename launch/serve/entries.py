"""What a queue holds: requests with their state, and the replicas that serve it."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any

from pydantic import TypeAdapter, ValidationError

from runtime.errors import BadRequestError
from runtime.files.problems import explain
from runtime.jobs.job import Job


class State(StrEnum):
    """Of a request."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a running request is.

    Attributes:
        label: of the generation; a compared job has two.
        nfe: evaluations since it was begun or resumed.
        seconds_left: expected, for its denoising.
    """

    label: str = ""
    step: int = 0
    steps: int = 0
    nfe: int = 0
    seconds_left: float | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """A request in the queue. Times are seconds since the epoch.

    Attributes:
        text: the job, as it was written down; `job` reads it.
        reason: why it failed, was cancelled, or waits again.
        kills: rank groups that ended while they worked at it.
        tries: how often it was begun.
        unwanted: somebody cancelled it.
        deadline: when it is to be given up.
        replica: that is, or was last, at work on it.
    """

    id: int
    name: str
    owner: str
    priority: int
    text: str
    state: State
    reason: str
    kills: int
    tries: int
    unwanted: bool
    submitted: float
    deadline: float | None
    started: float | None
    ended: float | None
    replica: int | None
    progress: Progress

    @property
    def job(self) -> Job:
        """What to do.

        Raises:
            BadRequestError: another version of Lockstep wrote it; the message names the request.
        """
        try:
            return Job.from_json(self.text)
        except BadRequestError as error:
            raise BadRequestError(f"{self.name}: {error}") from None


@dataclass(frozen=True, slots=True)
class ReplicaEntry:
    """What a replica of the pool that serves the queue is at.

    Attributes:
        places: of each rank: its number, host and device.
        restarts: groups that it had to replace.
    """

    number: int
    state: str
    places: list[dict[str, Any]]
    restarts: int


def read_replica(row: sqlite3.Row) -> ReplicaEntry:
    """The replica of a row of the queue."""
    return ReplicaEntry(row["number"], row["state"], json.loads(row["places"]), row["restarts"])


def read_entry(row: sqlite3.Row) -> Entry:
    """The request of a row of the queue; columns of other versions are left out.

    Raises:
        ValueError, TypeError, KeyError: no queue wrote it.
    """
    told = dict(row)
    progress = json.loads(told["progress"])
    told |= {
        "text": told["job"],
        "state": State(told["state"]),
        "unwanted": bool(told["unwanted"]),
        "progress": {f.name: progress[f.name] for f in fields(Progress) if f.name in progress},
    }
    try:
        return _ENTRY.validate_python({field.name: told[field.name] for field in fields(Entry)})
    except ValidationError as error:  # SQLite holds anything in any column
        raise ValueError(explain(error)) from None


_ENTRY = TypeAdapter(Entry)
