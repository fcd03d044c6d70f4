"""Runs jobs in this process and shows their progress: the last stage of every launcher."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from rich.console import Console

from launch.shell.progress import StepProgress, timed
from launch.shell.signals import ignore_signals
from launch.shell.terminal import counted, insist, print_path, say
from runtime.engine import Engine
from runtime.errors import BadRequestError
from runtime.jobs.batch import Batch, refuse_all
from runtime.jobs.job import Job
from runtime.jobs.run import do_job
from runtime.media.preview import PreviewFile, Previews
from runtime.parallel.ranks import Ranks
from runtime.reports.report import Report


def run_batch_shown(
    batch: Batch,
    console: Console,
    ranks: Ranks | None = None,
    on_loaded: Callable[[Engine], None] = lambda _: None,
) -> None:
    """Load the model, make the videos of every job, and print the paths of the results.

    Args:
        batch: the jobs; all are checked against the model before the first begins.
        console: where progress is shown; quiet on all ranks but the first.
        ranks: the rank group; by default this process alone.
        on_loaded: called with the engine before the first job starts, so that commands can be sent to it.
    """
    with timed(console, f"loading {batch.config.model}"):
        engine = Engine(batch.config, ranks, batch.first.degrees)
    on_loaded(engine)
    # Commanded until the last path is printed: a command that comes too late for one job stops the next.
    with engine.commanded():
        for job in _accepted(engine, batch, console):
            _run_shown(engine, job, console)
        ignore_signals()  # nothing is left to be stopped


def _accepted(engine: Engine, batch: Batch, console: Console) -> list[Job]:
    """Jobs that are left, after all were checked against the model; the first rank says which on all ranks.

    Raises:
        BadRequestError: one is not acceptable.
    """
    if len(batch.jobs) == 1:
        return [*batch.jobs]
    problems = []
    for job, name in zip(batch.jobs, batch.names, strict=True):
        try:
            engine.plan(job.request, job.preset)
        except BadRequestError as error:
            problems.append(f"{name}{error}")
    refuse_all(problems)
    mine = batch.wanted if engine.ranks.is_leader else []
    left = engine.ranks.control.all_gather_object(mine)[0]
    if engine.ranks.is_leader:
        print_made(batch, console)
    return [job for job, wanted in zip(batch.jobs, left, strict=True) if wanted]


def print_made(batch: Batch, console: Console) -> None:
    """Print the paths of what an earlier attempt at a batch has made, and how much is left."""
    made = [job for job, wanted in zip(batch.jobs, batch.wanted, strict=True) if not wanted]
    if made:
        say(console, f"{len(made)} of {counted(len(batch.jobs), 'request')} are made already")
    for job in made:
        for path in job.outputs.videos(job.request.videos):
            print_path(path)


def _run_shown(engine: Engine, job: Job, console: Console) -> None:
    """Do one job, and print the paths of its videos."""
    with previewed_in(job.outputs.preview, engine, overwrite=job.outputs.overwrite):
        done = do_job(engine, job, partial(StepProgress, console))
        if isinstance(done, Report):
            print_result(done, job, console)


@contextmanager
def previewed_in(path: Path | None, engine: Engine, *, overwrite: bool = False) -> Iterator[None]:
    """Let the engine's first rank show previews in the file `path` while the block runs; None for none.

    Args:
        overwrite: whether they may replace a file that is not a preview.
    """
    if path is None or not engine.ranks.is_leader:
        yield
        return
    shown = PreviewFile(path, overwrite=overwrite)
    with shown as file, Previews(file.put) as previews, engine.previewed(previews):
        yield


def _expected(report: Report) -> str:
    """Format the predicted PSNR; empty without a prediction."""
    known = report.expectation
    return "" if known.psnr is None else f" (expected {known.psnr:.1f} ± {known.deviation:.1f})"


def _summary(report: Report, job: Job) -> str:
    """Say which preset ran and why, what it computed, how long that took, and which PSNR is expected."""
    nfe, steps, seconds = max(report.nfe.cond, report.nfe.uncond), report.steps, report.seconds.denoise
    said = [job.told, f"{nfe} of {steps} steps computed", f"denoising {seconds:.1f} s"]
    known = report.expectation
    if nfe == steps:
        said.append("exact")
    elif known.psnr is not None and report.quality is None:
        said.append(f"expected PSNR {known.psnr:.1f} ± {known.deviation:.1f} dB")
    elif known.note and report.quality is None:
        said.append(known.note)
    return ", ".join(said)


def print_result(report: Report, job: Job, console: Console) -> None:
    """Print a summary on stderr and the paths of the videos on stdout."""
    if report.comparison is not None and report.quality is not None:
        vmaf = "" if report.quality.vmaf is None else f", VMAF {report.quality.vmaf:.1f}"
        console.print(
            f"denoising {report.comparison.speedup:.2f}× faster than the full sampler "
            f"(ideal {report.comparison.ideal_speedup:.2f}×), "
            f"PSNR {report.quality.psnr:.1f} dB{_expected(report)}, SSIM {report.quality.ssim:.4f}{vmaf}",
            soft_wrap=True,
        )
    console.print(f"report {job.outputs.report}, picture {job.outputs.picture}", soft_wrap=True)
    for warning in report.warnings:
        insist(console, f"warning: {warning}")
    say(console, _summary(report, job))
    for path in job.outputs.videos(job.request.videos):  # as the user named them; ranks have absolute paths
        print_path(path)
