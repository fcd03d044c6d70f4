"""Running a job: videos, report and picture, with a comparison if requested.

The first rank runs a job; the others follow it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from runtime.checkpoint.folder import Checkpoints
from runtime.engine import Engine, OnLatents, forgotten
from runtime.errors import BadRequestError, CancelledError
from runtime.files.atomic import flush, whole_files
from runtime.jobs.job import Job
from runtime.jobs.places import place
from runtime.media.ffmpeg import SILENCE
from runtime.media.latents import write_latents
from runtime.media.mp4 import ColourWatch, FrameSink, Tee, mp4_encoder
from runtime.media.quality import compare_videos
from runtime.media.raw import check_room, raw_videos
from runtime.parallel.ranks import Ranks
from runtime.parallel.topology import machine_name
from runtime.reports.report import LoraPart, ModelPart, Report, add_comparison, build_report
from runtime.sampling.denoise import OnStep
from runtime.sampling.plan import Plan
from runtime.sampling.result import Result
from spectrum import StepKind

log = logging.getLogger(__name__)

Progress = Callable[[str, Sequence[StepKind]], AbstractContextManager[OnStep]]
"""Opens a progress display for one generation, given its name and the kind of each of its steps."""


@contextmanager
def silent(label: str, kinds: Sequence[StepKind]) -> Iterator[OnStep]:
    """Progress display that shows nothing."""
    yield lambda _: None


def do_job(engine: Engine, job: Job, progress: Progress = silent) -> Report | Result:
    """Do one rank's part of a job, shown by `progress`; its report on the first rank, else its result."""
    return (run_job if engine.ranks.is_leader else follow_job)(engine, job, progress)


def run_job(engine: Engine, job: Job, progress: Progress = silent) -> Report:
    """Carry out a job on the first rank: generate and write the videos, the report and the picture.

    A compared job runs the full sampler on the same request first. The transformer runs once beforehand, so
    that neither time includes the setup of a first forward.

    Args:
        engine: the loaded model.
        job: the job; its recipe, if it has one, must still hold.
        progress: display of the steps.

    Raises:
        BadRequestError: the request does not fit the model, the recipe has changed, or a file cannot be
            written; nothing was started.
        JobFailedError: writing a file failed.
    """
    job = job.resumed()
    with _begun(engine, job) as plans, _files(job) as files:
        if job.compare:
            report = _generate_both(engine, job, plans, files, progress)
        else:
            report = _generate_files(engine, job, plans[-1], files, progress)[1]
        return _write(report, files)


def follow_job(engine: Engine, job: Job, progress: Progress = silent) -> Result:
    """Follow a job on a rank that writes no files: make the same generations as the first, in its order."""
    with _begun(engine, job) as plans:
        if job.compare:
            _generate_full(engine, job, plans[0], [], progress)
        return generate_shown(engine, plans[-1], [], progress, job.checkpoints)


def generate_shown(
    engine: Engine,
    plan: Plan,
    sinks: Sequence[FrameSink],
    progress: Progress,
    checkpoints: Checkpoints | None = None,
    on_latents: OnLatents = forgotten,
) -> Result:
    """Generate videos into `sinks`, shown by `progress`, after memory options that are `auto` are decided."""
    place(engine, plan)
    label = f"{plan.request.spectrum}, seed {plan.request.seed}"
    with progress(label, plan.kinds) as on_step:
        return engine.run(plan, sinks, on_step, checkpoints, on_latents)


def _generate_both(
    engine: Engine, job: Job, plans: Sequence[Plan], files: _Files, progress: Progress
) -> Report:
    """Generate the job's videos after those of the full sampler, and compare them."""
    count = job.request.videos
    with raw_videos(job.request, count) as ours, raw_videos(job.request, count) as theirs:
        full = _generate_full(engine, job, plans[0], theirs.sinks, progress)
        result, report = _generate_files(engine, job, plans[-1], files, progress, ours.sinks)
        ours.flush()
        theirs.flush()
        measured = [compare_videos(a, b) for a, b in zip(ours.videos, theirs.videos, strict=True)]
    add_comparison(report, result, full, measured)
    return report


def _generate_full(
    engine: Engine, job: Job, plan: Plan, sinks: Sequence[FrameSink], progress: Progress
) -> Result:
    """Generate the video that a job is compared with."""
    engine.warm_up(plan)
    return generate_shown(engine, plan, sinks, progress, job.checkpoints)


@contextmanager
def _begun(engine: Engine, job: Job) -> Iterator[list[Plan]]:
    """Begin a job on all ranks or on none, and end it on all together; yields the plans of its generations.

    The first rank of every disk locks the checkpoints meanwhile, and removes them when the job succeeds.

    Raises:
        BadRequestError: a rank refuses the job; raised on all ranks.
    """
    ranks = engine.ranks
    ranks.at("the start of a job", busy=True)
    try:
        with _held(engine, job) as plans:
            yield plans
    except (BadRequestError, CancelledError):
        ranks.at("idle")  # these errors end the job, not its ranks
        raise
    ranks.at("idle")


@contextmanager
def _held(engine: Engine, job: Job) -> Iterator[list[Plan]]:
    """Check a job on all ranks, and hold its LoRAs, image, locks and mailbox while the block runs."""
    kept, is_leader = job.checkpoints, engine.ranks.is_leader
    engine.switch(job.config.lora)
    with ExitStack() as stack:
        problem, plans = "", list[Plan]()
        try:
            plans += _plans(engine, job)
            stack.enter_context(engine.inputs.held(job.request))
            if is_leader:
                _check_outputs(job)
        except BadRequestError as error:
            problem = str(error)
        engine.ranks.refuse_together(problem)
        needed = job.recipe is not None or kept is not None
        recipes = [engine.recipe(plan) for plan in plans] if needed else []
        identities = [recipe.latents.text for recipe in recipes]
        try:
            if job.recipe is not None:
                job.recipe.check_same(recipes[-1])
            if kept is not None and is_leader:
                stack.enter_context(kept.locked(identities))
        except BadRequestError as error:
            problem = str(error)
        engine.ranks.refuse_together(problem)
        if kept is not None and engine.ranks.several_machines:
            stack.enter_context(_held_elsewhere(kept, identities, engine.ranks))
        stack.enter_context(engine.commanded())
        yield plans
        # No rank leaves or removes checkpoints before the files are written, as any may fail until then.
        engine.ranks.control.all_gather_object("done")
        if kept is not None and is_leader:
            _discard(kept)


@contextmanager
def _held_elsewhere(kept: Checkpoints, identities: Sequence[str], ranks: Ranks) -> Iterator[None]:
    """Hold the checkpoints on every disk that the first rank, which holds its own, does not share.

    Raises:
        BadRequestError: a machine refuses; raised on all ranks.
    """
    own, held = False, [ranks.control.all_gather_object(kept.mark)[0]]
    _, *leaders = [ranks.hosts.index(host) for host in dict.fromkeys(ranks.hosts)]
    with ExitStack() as stack:
        for leader in leaders:  # one after the other, as some may share a disk
            problem, mark = "", kept.mark
            try:
                if ranks.rank == leader and (not mark or mark not in held):
                    stack.enter_context(kept.locked(identities))
                    own = True
            except BadRequestError as error:
                problem = f"{error} (on {machine_name(ranks.hosts[ranks.rank])})"
            ranks.refuse_together(problem)
            held.append(ranks.control.all_gather_object(kept.mark)[leader])
        yield
        if own:
            _discard(kept)


def _discard(kept: Checkpoints) -> None:
    try:
        kept.discard()
    except OSError as error:
        log.warning("checkpoints: cannot remove them from %r: %s", str(kept.root), error)


def _plans(engine: Engine, job: Job) -> list[Plan]:
    """Plan a job's generations, of which the last is the one whose videos are written."""
    compared = [engine.plan(job.request.full)] if job.compare else []
    return [*compared, engine.plan(job.request, job.preset)]


def _check_outputs(job: Job) -> None:
    """Refuse files that cannot be written, and frames to compare that do not fit the disk."""
    videos = job.request.videos
    job.outputs.check(videos)
    if job.compare:
        check_room(job.request, 2 * videos)


@dataclass(frozen=True, slots=True)
class _Files:
    """Temporary files of a job, which get their names when all of them are done."""

    report: Path
    picture: Path
    videos: list[Path]
    latents: Path | None


@contextmanager
def _files(job: Job) -> Iterator[_Files]:
    """Open the job's files, which get their names together when the block succeeds."""
    outputs, count = job.outputs, job.request.videos
    names = list(outputs.all(count))
    with whole_files(names, overwrite=outputs.overwrite) as temporaries:
        of = dict(zip(names, temporaries, strict=True))
        videos = [of[path] for path in outputs.videos(count)]
        latents = None if outputs.latents is None else of[outputs.latents]
        yield _Files(of[outputs.report], of[outputs.picture], videos, latents)


def _generate_files(
    engine: Engine,
    job: Job,
    plan: Plan,
    files: _Files,
    progress: Progress,
    also: Sequence[FrameSink] = (),
) -> tuple[Result, Report]:
    """Generate into mp4 files, and into the sinks `also`, one per video, if given."""
    request, fps = plan.request, engine.config.fps
    videos, bound = job.outputs.videos(request.videos), min(SILENCE, engine.config.busy_timeout)
    with ExitStack() as stack:
        sinks: list[FrameSink] = [
            stack.enter_context(
                mp4_encoder(path, width=request.width, height=request.height, fps=fps, silence=bound)
            )
            for path in files.videos
        ]
        watches = [ColourWatch() for _ in videos]
        sinks = [Tee(*one) for one in zip(sinks, watches, *([also] if also else []), strict=True)]
        keep = forgotten if files.latents is None else partial(_keep, files.latents, request.frames)
        result = generate_shown(engine, plan, sinks, progress, job.checkpoints, keep)
        for path, watch in zip(videos, watches, strict=True):
            result.warnings += watch.warning(path.name)
        finishing = time.perf_counter()
    for path in files.videos:
        flush(path)
    report = build_report(
        _model_of(engine),
        result,
        videos,
        load_seconds=engine.load_seconds,
        write_seconds=time.perf_counter() - finishing,
        chosen=job.chosen,
    )
    return result, report


def _model_of(engine: Engine) -> ModelPart:
    """The engine's model, as the report names it."""
    model = engine.model
    loras = [LoraPart(**one.lora.model_dump(), digest=one.digest) for one in model.loras]
    return ModelPart(name=model.name, revision=model.revision, loras=loras)


def _keep(path: Path, frames: int, latents_BCFHW: torch.Tensor) -> None:
    """Write the latents of a video of so many frames."""
    write_latents(path, latents_BCFHW, frames)


def _write(report: Report, files: _Files) -> Report:
    from runtime.reports.run_picture import write_picture

    files.report.write_text(report.to_json() + "\n", encoding="utf-8")
    write_picture(report, files.picture)
    return report
