"""Requests that a queue is given, and waiting for their end."""

from __future__ import annotations

import getpass
import logging
import os
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.serve.entries import Entry, State
from launch.serve.queue import Queue, check_line
from runtime.errors import CancelledError, JobFailedError, reason
from runtime.files.checks import check_outlives
from runtime.files.text import user_path
from runtime.jobs.batch import Batch
from runtime.jobs.options import JobOptions

if TYPE_CHECKING:  # it takes seconds
    from runtime.reports.report import Report

log = logging.getLogger("launch")

_LOOK = 0.5  # seconds between two looks at a queue


def submit_all(
    folder: Path,
    batch: Batch,
    *,
    name: str | None = None,
    owner: str | None = None,
    priority: int = 0,
    expires: float | None = None,
) -> list[int]:
    """Add jobs to the queue in a folder, all or none; returns their numbers.

    Args:
        name: name of a single request, unique in the queue; by default made from its number.
        owner: owners of the same priority share the replicas fairly; by default this process's user.
        priority: requests of higher priority run first.
        expires: seconds after which a request is given up.

    Raises:
        BadRequestError: a job, the folder or something else that is given is not acceptable.
        QueueError: the queue's file cannot be written now.
    """
    check_outlives(folder, field="queue")
    check_line("owner", owner)
    check_line("name", name)
    batch.check_files()
    jobs = batch.planned().jobs  # whoever serves it stands elsewhere, and it may be later
    whose = owner or _user()
    with closing(Queue(folder)) as queue, queue.transaction() as base:
        return [
            queue.insert(base, job, name=name, owner=whose, priority=priority, seconds=expires)
            for job in jobs
        ]


def submit(
    prompt: str,
    *,
    out: str | Path,
    queue: str | Path = "queue",
    name: str | None = None,
    owner: str | None = None,
    priority: int = 0,
    expires: float | None = None,
    **options: Any,
) -> Submitted:
    """Add a request to a queue, which `lockstep queue run` serves.

    Args:
        prompt: what the video shows.
        out: the mp4.
        queue: folder of the queue; created if there is none.
        name, owner, priority, expires: as of `submit_all`.
        options: what `lockstep generate` takes, by the names of `JobOptions`: `config`, `ranks`, `seed` …

    Raises:
        BadRequestError: the request or a file is not acceptable; nothing was added.
        QueueError: the queue's file cannot be written now.

    Example:
        >>> request = submit("a red circle", out="a.mp4", queue="films", frames=5)
        >>> request.state
        <State.WAITING: 'waiting'>
    """
    files = {field: user_path(str(one)) for field, one in options.items() if isinstance(one, Path)}
    job = JobOptions.parse(prompt=prompt, out=user_path(str(out)), **options | files).job()
    folder = user_path(str(queue)).absolute()
    [number] = submit_all(folder, Batch([job]), name=name, owner=owner, priority=priority, expires=expires)
    return Submitted(folder, number)


@dataclass(frozen=True, slots=True)
class Submitted:
    """A request in a queue.

    Attributes:
        queue: folder of the queue.
        number: its number, by which `lockstep status` shows it.
    """

    queue: Path
    number: int

    @property
    def entry(self) -> Entry:
        """What the queue knows of it now.

        Raises:
            QueueError: the queue's file cannot be read now.
        """
        with closing(Queue(self.queue)) as queue:
            return queue.entry(self.number)

    @property
    def state(self) -> State:
        """Whether it is `waiting`, `running`, `done`, `failed` or `cancelled`."""
        return self.entry.state

    @property
    def progress(self) -> float:
        """How many of its steps are done, from 0 to 1; of a comparison, those of the present video."""
        entry = self.entry
        if entry.state is State.DONE:
            return 1.0
        return entry.progress.step / entry.progress.steps if entry.progress.steps else 0.0

    def cancel(self) -> None:
        """Cancel it: a waiting request ends now, a running one after a step, an ended one stays as it is."""
        with closing(Queue(self.queue)) as queue:
            queue.cancel(self.number)

    def wait(self, timeout: float | None = None) -> Report:
        """Wait until it has ended, and return its report.

        Args:
            timeout: seconds; by default there is no limit.

        Raises:
            CancelledError: it was cancelled, or has expired.
            JobFailedError: it has failed, or its report is not there any more.
            TimeoutError: it has not ended within the time; it goes on.
        """
        until = None if timeout is None else time.monotonic() + timeout
        with closing(Queue(self.queue)) as queue:
            if queue.entry(self.number).state is State.WAITING and not queue.replicas():
                log.warning("%s", self._unserved)
            while (entry := queue.entry(self.number)).state in (State.WAITING, State.RUNNING):
                if until is not None and time.monotonic() >= until:
                    note = "" if queue.replicas() else f"; {self._unserved}"
                    raise TimeoutError(f"{entry.name} is {entry.state} after {timeout:g} s{note}")
                time.sleep(_LOOK if until is None else min(_LOOK, max(0.0, until - time.monotonic())))
        return _report(entry)

    @property
    def _unserved(self) -> str:
        return f"no replica serves the queue now: run `lockstep queue run --queue {self.queue}`"


def _report(entry: Entry) -> Report:
    """Report of a request that has ended."""
    from runtime.reports.report import Report

    if entry.state is State.CANCELLED:
        raise CancelledError(f"{entry.name} was cancelled: {entry.reason}")
    if entry.state is State.FAILED:
        raise JobFailedError(f"{entry.name} failed: {entry.reason}")
    path = entry.job.outputs.report
    try:
        return Report.model_validate_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise JobFailedError(
            f"{entry.name} is done, but {str(path)!r} is not a report: {reason(error)}"
        ) from None


def _user() -> str:
    """Return the name of this process's user, or `uid-N` if it has none, as in some containers."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid-{os.getuid()}"
