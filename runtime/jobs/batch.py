"""Batches: jobs for the same model, which is loaded once for all of them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.errors import BadRequestError
from runtime.files.text import read_json
from runtime.jobs.job import Job
from runtime.models.folder import local_revision
from runtime.request.config import Config

if TYPE_CHECKING:  # it takes seconds
    from runtime.profile import ModelProfile

log = logging.getLogger(__name__)

_SHOWN = 10  # jobs whose problems are listed


@dataclass(frozen=True)
class Batch:
    """Jobs that one rank group does one after another; they have the same config, ranks and time limit.

    Attributes:
        jobs: the jobs, in order; at least one.
        names: what each is called in messages; empty for a job that the user gave alone.
    """

    jobs: Sequence[Job]
    names: Sequence[str] = ("",)

    @property
    def first(self) -> Job:
        """Any of the jobs, for what all have in common."""
        return self.jobs[0]

    @property
    def config(self) -> Config:
        """Config of all the jobs."""
        return self.first.config

    @cached_property
    def wanted(self) -> list[bool]:
        """For each job, whether it is to be done: not if the batch resumes an attempt that finished it."""
        if len(self.jobs) == 1:
            return [True]
        return [not self._is_finished(job) for job in self.jobs]

    def prepare(self) -> None:
        """Read the model's settings if they tell which jobs are finished.

        Every rank of a group does so before it joins the others, which would not wait for it.
        """
        kept = self.first.checkpoints
        if len(self.jobs) > 1 and kept is not None and kept.resume:
            _ = self._profile

    @property
    def left(self) -> list[Job]:
        """Jobs that are to be done."""
        return [job for job, wanted in zip(self.jobs, self.wanted, strict=True) if wanted]

    def planned(self) -> Batch:
        """Copy the batch with the jobs that are left, as `Job.absolute` and `Job.planned` do."""
        revision = local_revision(self.config)
        pairs = zip(self.jobs, self.names, self.wanted, strict=True)
        left = [(job.absolute().planned(revision=revision), name) for job, name, wanted in pairs if wanted]
        return Batch([job for job, _ in left], [name for _, name in left])

    def _is_finished(self, job: Job) -> bool:
        """Return whether all files of a job that resumes are there, and would be the same again."""
        kept = job.checkpoints
        if kept is None or not kept.resume or not job.is_made():
            return False
        if not all(path.is_file() for path in job.outputs.all(job.request.videos)):
            return False
        try:
            return bool(read_json(job.outputs.report).get("recipe") == self._recipe(job))
        except (OSError, ValueError):
            return False

    def _recipe(self, job: Job) -> str:
        """Digest of a job's recipe, for which the model's settings are read."""
        recipe = job.planned(self._profile).recipe
        assert recipe is not None
        return recipe.digest

    @cached_property
    def _profile(self) -> ModelProfile:
        from runtime.profile import ModelProfile

        return ModelProfile(self.config)

    def check_files(self) -> None:
        """Refuse files that cannot be read or written, and those that two of the jobs would write.

        Raises:
            BadRequestError: see `Job.check_files`; one line for each of the first jobs with a problem.
        """
        self._check_apart()
        problems, anew = [], self._beginning_anew()
        for job, name, wanted in zip(self.jobs, self.names, self.wanted, strict=True):
            try:
                if wanted:
                    job.check_files()
            except BadRequestError as error:
                problems.append(f"{name}{error}")
        refuse_all(problems)
        if anew:
            log.warning("resume: %s", anew)

    def _beginning_anew(self) -> str:
        """Say which of the jobs that are to resume start at the first step; empty for none."""
        kept = [job.checkpoints for job in self.left if job.checkpoints is not None]
        anew = [one for one in kept if one.begins_anew]
        if len(self.jobs) == 1 and anew:
            what = "complete checkpoint" if anew[0].left else "checkpoint"
            return f"there is no {what} in {str(anew[0].root)!r}; starting at the first step"
        return f"{len(anew)} of {len(self.jobs)} requests start at the first step" if anew else ""

    def _check_apart(self) -> None:
        writer: dict[Path, str] = {}
        for job, name in zip(self.jobs, self.names, strict=True):
            for path, field in job.outputs.touched(job.request.videos).items():
                other = writer.setdefault(path.absolute(), name)
                if other != name:
                    raise BadRequestError(
                        f"{name}{field}: {str(path)!r} given; {other.removesuffix(': ')} writes it, too: "
                        f"put {{number}} into --{field}"
                    )

    def advice(self) -> str:
        """Return how to go on after an interruption."""
        if len(self.jobs) == 1:
            return self.first.advice()
        kept = self.first.checkpoints
        if kept is None:
            return "without checkpoints nothing can be resumed"
        made = sum(job.is_made() for job in self.jobs)
        option = "" if kept.resume else " with --resume"
        return f"{made} of {len(self.jobs)} are made: the same command{option} makes the others"


def refuse_all(problems: Sequence[str]) -> None:
    """Refuse several jobs with one line for each.

    Raises:
        BadRequestError: there are any; the first ones are listed.
    """
    if problems:
        more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        raise BadRequestError("\n".join([*problems[:_SHOWN], *more]))
