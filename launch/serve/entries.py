"""Contents of a queue: requests with their states, and the replicas that serve it."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from runtime.errors import BadRequestError
from runtime.files.problems import explain
from runtime.jobs.job import Job
from runtime.request.config import Lora, Loras

EXPIRED = "its deadline passed"  # beginning of the reason why a request was cancelled


class State(StrEnum):
    """State of a queued request."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of a running request.

    Attributes:
        label: name of the current generation; a compared job has two.
        nfe: evaluations since it was started or resumed.
        seconds_left: expected seconds until denoising ends.
        preview: path of the WebP that shows what it is becoming; empty if there is none.
    """

    label: str = ""
    step: int = 0
    steps: int = 0
    nfe: int = 0
    seconds_left: float | None = None
    preview: str = ""


@dataclass(frozen=True, slots=True)
class RunEvent:
    """What happened while a request ran, for whoever follows it.

    Attributes:
        kind: `begun` (a generation), `step`, or `preview` (a new one can be read).
        told: its details, for JSON.
    """

    kind: str
    told: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Entry:
    """A request in the queue. Times are seconds since the epoch.

    Attributes:
        text: the job as JSON; `job` parses it.
        reason: why it failed, was cancelled, or waits again.
        kills: rank groups that crashed while running it.
        tries: number of attempts so far.
        unwanted: it was cancelled by a user.
        deadline: when it expires.
        replica: number of the replica that runs it, or ran it last.
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
    def through_api(self) -> bool:
        """Whether it was made through the HTTP API, which also resumes it."""
        return self.name.startswith("video_")

    @property
    def loras(self) -> str:
        """Its LoRAs in few words, such as `style × 0.8, low:detail`; empty without any, or if another version
        of Lockstep wrote it."""
        try:
            loras = _LORAS.validate_python(json.loads(self.text)["config"]["lora"])
        except (ValueError, TypeError, KeyError, RecursionError):
            return ""
        return ", ".join(map(_in_words, loras))

    @property
    def job(self) -> Job:
        """The job to run.

        Raises:
            BadRequestError: another version of Lockstep wrote it; the message names the request.
        """
        try:
            return Job.from_json(self.text)
        except BadRequestError as error:
            raise BadRequestError(f"{self.name}: {error}") from None


@dataclass(frozen=True, slots=True)
class ReplicaEntry:
    """State of one replica of the pool that serves the queue.

    Attributes:
        places: number, host, device and process id of each rank.
        restarts: number of rank groups that it had to replace.
    """

    number: int
    state: str
    places: list[dict[str, Any]]
    restarts: int


def read_replica(row: sqlite3.Row) -> ReplicaEntry:
    """Parse a row of the table `replicas`."""
    return ReplicaEntry(row["number"], row["state"], json.loads(row["places"]), row["restarts"])


def read_entry(row: sqlite3.Row) -> Entry:
    """Parse a row of the table `requests`, ignoring columns of other versions.

    Raises:
        ValueError, TypeError, KeyError: Lockstep did not write the row.
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
    except ValidationError as error:  # SQLite stores any type in any column
        raise ValueError(explain(error)) from None


def _in_words(lora: Lora) -> str:
    expert = f"{lora.expert}:" if lora.expert else ""
    scale = "" if lora.scale == 1.0 else f" × {lora.scale:g}"
    return f"{expert}{Path(lora.file).stem}{scale}"


_LORAS = TypeAdapter(Loras)
_ENTRY = TypeAdapter(Entry)
