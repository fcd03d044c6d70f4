"""Jobs that are killed at a moment of their end, for tests of how they resume."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from runtime.engine import Engine
from runtime.jobs.job import Job
from runtime.jobs.run import do_job
from runtime.parallel.ranks import Ranks
from runtime.reports.report import Report
from tests.ranks import die, watch_ranks


def killed_between_files(job: Job, world: int = 1) -> None:
    """Run a job whose first rank is killed when its report has its name and its video has none yet."""
    outcomes = watch_ranks(world, _killed, job, timeout=30)
    assert outcomes[0].code == -9, outcomes
    assert job.outputs.report.exists() and not job.outputs.video.exists()
    assert job.checkpoints is not None and job.checkpoints.newest is not None


def _killed(ranks: Ranks, job: Job) -> None:
    def dying(give: Any) -> Any:
        def given(source: Path, target: Path) -> None:
            give(source, target)
            if Path(target) == job.outputs.report:
                die()

        return given

    os.link, os.replace = dying(os.link), dying(os.replace)
    do_job(Engine(job.config, ranks, job.degrees), job)


def done(ranks: Ranks, job: Job) -> tuple[int, list[str], list[str]] | None:
    """Run a job to its end; where it began, its decisions, and its frames, on the first rank."""
    if ranks.is_leader:
        job.check_files()
    report = do_job(Engine(job.config, ranks, job.degrees), job)
    if not isinstance(report, Report):
        return None
    return report.resumed_at, report.decision_digest, report.frames_sha256
