"""One job on Ray: places a rank group, and a new one when it dies, until the job is done."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

from rich.console import Console

from launch.cluster.cluster import on_cluster
from launch.cluster.driver import Driver
from launch.cluster.group import Begun, End, Ended, Event, Previewed, RankGroup
from launch.cluster.metrics import DriverMetrics
from launch.shell.progress import StepProgress
from launch.shell.pulse import Pulse
from launch.shell.run import print_made, print_result
from launch.shell.signals import stopped_by_signals
from launch.shell.terminal import say
from runtime.errors import BadRequestError, CancelledError, JobFailedError, NotFiniteError
from runtime.jobs.batch import Batch
from runtime.jobs.job import Job
from runtime.media.preview import PreviewFile
from runtime.reports.report import Report

log = logging.getLogger("launch")

States = dict[Path, tuple[int, int] | None]
"""What tells each file of a job from one that replaces it."""

ATTEMPTS = 3  # rank groups that a job may use
BACKOFF = 1.0  # seconds before the second attempt; doubled before each further one


def run_batch_on_ray(batch: Batch, console: Console) -> None:
    """Run jobs on their cluster, from placing the ranks to printing the paths of the results."""
    if len(batch.jobs) == 1:
        _run_job_on_ray(batch.first, console)
        return
    print_made(batch, console)
    about = {"prompt": f"{len(batch.left)} prompts", "config": batch.config.model_name}
    before = [job.outputs.state(job.request.videos) for job in batch.left]
    on_cluster(batch.first.world, about, partial(_all_in_driver, batch.left, before, console), console)
    for job in batch.left:  # here, as a driver's stdout is not the command's
        print_result(Report.model_validate_json(job.outputs.report.read_bytes()), job, console)


def _all_in_driver(jobs: Sequence[Job], before: Sequence[States], console: Console, driver: Driver) -> None:
    """Run jobs on one rank group; those that an earlier driver finished are left out.

    Raises:
        BadRequestError: the first one is not acceptable.
        JobFailedError: a later one is not, or see `run_on_ray`.
    """
    left = [job for job, files in zip(jobs, before, strict=True) if _made_since(job, files) is None]
    run = _Run(console, pulse=driver.pulse, again=driver.again)
    with driver.stopped_by_signals(run.stop):
        try:
            for number, job in enumerate(left):
                try:
                    run.until_done(job.absolute().planned())
                except BadRequestError as error:
                    if number or driver.again:
                        raise JobFailedError(str(error)) from None  # something was made
                    raise
                say(console, f"{number + 1} of {len(left)} done: {job.outputs.video}")
        finally:
            run.dismiss()


def _run_job_on_ray(job: Job, console: Console) -> None:
    """Run a job on its cluster, from placing the ranks to printing the path of the result."""
    about = {"prompt": job.request.prompt, "config": job.config.model_name, "out": str(job.outputs.video)}
    made = partial(_made_since, job, job.outputs.state(job.request.videos))
    print_result(on_cluster(job.world, about, partial(_in_driver, job, console), console, made), job, console)


def _made_since(job: Job, before: States) -> Report | None:
    """Report of a job all files of which were written since; None if it is not done.

    Ranks may finish a job whose driver is lost.
    """
    now = job.outputs.state(job.request.videos)
    if not job.is_made() or any(state is None or state == before[path] for path, state in now.items()):
        return None
    if job.checkpoints is not None:
        job.checkpoints.remove()
    return Report.model_validate_json(job.outputs.report.read_bytes())


def _in_driver(job: Job, console: Console, driver: Driver) -> Report:
    return run_on_ray(
        job,
        console,
        again=driver.again,
        pulse=driver.pulse,
        stopped_by=driver.stopped_by_signals,
        on_done=driver.done,
    )


OnEvent = Callable[[Event, RankGroup], None]


def run_on_ray(
    job: Job,
    console: Console,
    on_event: OnEvent = lambda event, group: None,
    attempts: int = ATTEMPTS,
    pulse: Pulse | None = None,
    again: bool = False,
    stopped_by: Callable[[Callable[[], bool]], AbstractContextManager[None]] = stopped_by_signals,
    on_done: Callable[[Report], None] = lambda report: None,
) -> Report:
    """Make the video on a group of actors, replacing the group when it is lost.

    Args:
        attempts: rank groups that the job may use.
        on_event: called with every event and the group at work.
        pulse: see `RankGroup`.
        again: an earlier driver ran this job and was lost, so the job itself is acceptable.
        stopped_by: context manager that is given the function to stop the job.
        on_done: called with the report before the ranks are ended, which may block if Ray does not answer.

    Raises:
        BadRequestError: the request or the cluster does not fit.
        CancelledError: a signal came.
        JobFailedError: too many groups died, or a job that had begun is refused when it is to resume.
        NotFiniteError: a step produced NaN or infinity, as it would on any group.
    """
    run = _Run(console, on_event, attempts, pulse, again=again)
    with stopped_by(run.stop):
        try:
            return run.until_done(job.absolute().planned(), on_done)
        finally:
            run.dismiss()


class _Run:
    """The driver's side of jobs that one rank group does one after another; a lost group is replaced."""

    def __init__(
        self,
        console: Console,
        on_event: OnEvent = lambda event, group: None,
        attempts: int = ATTEMPTS,
        pulse: Pulse | None = None,
        *,
        again: bool,
    ):
        self._again = again
        self._console, self._on_event, self._attempts = console, on_event, attempts
        self._pulse = pulse
        self._group: RankGroup | None = None
        self._cancelled = threading.Event()
        self._progress: StepProgress | None = None
        self._metrics = DriverMetrics()

    def stop(self) -> bool:
        """Stop after a step, or before the ranks have started; always possible."""
        self._cancelled.set()
        group = self._group
        if group is not None:
            group.stop()
        return True

    def until_done(self, job: Job, on_done: Callable[[Report], None] = lambda report: None) -> Report:
        """Do a job, on new groups if need be; the group is kept for the next one, see `dismiss`."""
        failures: list[str] = []
        while True:
            if self._group is not None and self._cancelled.is_set():  # too late for the job before
                raise CancelledError("stopped before this video began")
            ended = self._attempt(job.retried(restart=True) if failures or self._again else job)
            match ended.end:
                case End.DONE:
                    report = Report.model_validate_json(ended.report)
                    on_done(report)
                    return report
                case End.REFUSED if failures:  # it was accepted before
                    raise JobFailedError(f"{failures[-1]}; then {ended.reason}")
                case End.REFUSED if self._again:
                    raise JobFailedError(f"the Ray driver process was lost; then {ended.reason}")
                case End.REFUSED:
                    raise BadRequestError(ended.reason)
                case End.CANCELLED:
                    raise CancelledError(ended.reason)
                case End.HOPELESS:
                    raise NotFiniteError(ended.reason)
            failures.append(ended.reason)
            self.dismiss()
            self._metrics.restarted()
            self._pause(failures)

    def _attempt(self, job: Job) -> Ended:
        """Run the job on the group, starting one if there is none."""
        try:
            if self._group is None:
                say(self._console, f"placing {job.world} ranks and loading {job.config.model}")
                self._group = RankGroup(job, self._pulse, self._cancelled.is_set)
                where = ", ".join(f"{p['rank']} on {p['host']} ({p['device']})" for p in self._group.places)
                say(self._console, f"ranks: {where}")
        except CancelledError as error:
            return Ended(End.CANCELLED, str(error))
        except BadRequestError as error:
            return Ended(End.REFUSED, str(error))
        except JobFailedError as error:
            return Ended(End.FAILED, str(error))
        path, overwrite = job.outputs.preview, job.outputs.overwrite
        with nullcontext() if path is None else PreviewFile(path, overwrite=overwrite) as preview:
            return self._follow(self._group, job, preview)

    def _follow(self, group: RankGroup, job: Job, preview: PreviewFile | None) -> Ended:
        """Run the job on a group and show its events, to the end."""
        for event in group.run(job, previews=preview is not None):
            if self._cancelled.is_set():  # the signal came before there was a job to stop
                group.stop()
            if isinstance(event, Ended):
                self._show(None)
                return event
            self._on_event(event, group)
            if isinstance(event, Begun):
                self._show(StepProgress(self._console, event.label, event.kinds))
            elif isinstance(event, Previewed):
                if preview is not None and event.content:
                    preview.put(event.content)
            elif self._progress is not None:
                self._progress(event)
        raise RuntimeError("a job ended without an end")

    def _show(self, progress: StepProgress | None) -> None:
        if self._progress is not None:
            self._progress.__exit__(None, None, None)
        self._progress = progress
        if progress is not None:
            progress.__enter__()

    def _pause(self, failures: list[str]) -> None:
        """Wait before the next attempt; raise if there is to be none."""
        if self._cancelled.is_set():
            raise CancelledError(f"cancelled while the ranks were failing: {failures[-1]}")
        if len(failures) >= self._attempts:
            raise JobFailedError(f"{failures[-1]} (attempt {len(failures)} of {self._attempts})")
        seconds = BACKOFF * 2 ** (len(failures) - 1)
        say(self._console, f"{failures[-1]}; retrying with new ranks in {seconds:.0f} s")
        self._cancelled.wait(seconds)

    def dismiss(self) -> None:
        """End the rank group, if there is one."""
        if self._group is not None:
            self._group.kill()
            self._group = None
