"""Running a job: from a request to videos, report and picture, with a comparison if requested.

The first rank runs a job; the others follow it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from runtime.checkpoint.folder import Checkpoints
from runtime.engine import Engine
from runtime.errors import BadRequestError, CancelledError
from runtime.files.atomic import flush, whole_files
from runtime.media.ffmpeg import SILENCE
from runtime.media.mp4 import ColourWatch, FrameSink, Tee, mp4_encoder
from runtime.media.quality import compare_videos
from runtime.media.raw import check_room, raw_videos
from runtime.recipe import Recipe
from runtime.reports.report import ModelPart, Report, add_comparison, build_report
from runtime.request.outputs import Outputs
from runtime.request.video_request import VideoRequest
from runtime.sampling.denoise import StepRecord
from runtime.sampling.plan import Generation, Plan
from spectrum import StepKind

log = logging.getLogger(__name__)

OnStep = Callable[[StepRecord], None]
Progress = Callable[[str, Sequence[StepKind]], AbstractContextManager[OnStep]]
"""Opens a progress display for one generation, given its name and the kind of each of its steps."""


@contextmanager
def silent(label: str, kinds: Sequence[StepKind]) -> Iterator[OnStep]:
    """Progress display that shows nothing."""
    yield lambda _: None


def run_job(
    engine: Engine,
    request: VideoRequest,
    outputs: Outputs,
    progress: Progress = silent,
    checkpoints: Checkpoints | None = None,
    planned: Recipe | None = None,
) -> Report:
    """Generate and write the videos, the report and the picture.

    Args:
        engine: the loaded model.
        request: the request.
        outputs: paths of the files.
        progress: display of the steps.
        checkpoints: folder of checkpoints, which are removed when all files are written.
        planned: recipe with which the job was planned; another one is refused.

    Raises:
        BadRequestError: the request does not fit the model, or a file cannot be written; nothing was started.
        JobFailedError: writing a file failed.
    """
    with _begun(engine, [request], outputs, checkpoints, planned), _files(outputs, request) as files:
        _, report = _generate_files(engine, request, outputs, files, progress, checkpoints)
        return _write(report, files)


def run_compared_job(
    engine: Engine,
    request: VideoRequest,
    outputs: Outputs,
    progress: Progress = silent,
    checkpoints: Checkpoints | None = None,
    planned: Recipe | None = None,
) -> Report:
    """Run a job as `run_job` does, after the full sampler on the same request, and compare with it.

    The transformer runs once beforehand, so that neither time includes the setup of a first forward.
    """
    with (
        _begun(engine, [request.full, request], outputs, checkpoints, planned),
        _files(outputs, request) as files,
        raw_videos(request, request.videos) as ours,
        raw_videos(request, request.videos) as theirs,
    ):
        engine.warm_up(request)
        full = generate_shown(engine, request.full, theirs.sinks, progress, checkpoints)
        generation, report = _generate_files(
            engine, request, outputs, files, progress, checkpoints, ours.sinks
        )
        ours.flush()
        theirs.flush()
        measured = [compare_videos(a, b) for a, b in zip(ours.videos, theirs.videos, strict=True)]
        add_comparison(report, generation, full, measured)
        return _write(report, files)


@contextmanager
def _begun(
    engine: Engine,
    requests: Sequence[VideoRequest],
    outputs: Outputs | None,
    checkpoints: Checkpoints | None,
    planned: Recipe | None,
) -> Iterator[None]:
    """Begin a job on all ranks or on none, and end it on all together.

    The rank with `outputs` locks the checkpoints meanwhile, and removes them when the job succeeds.

    Args:
        engine: the loaded model.
        requests: requests of the job's generations; the videos of the last are written.
        outputs: paths of the files; None on ranks that write none.
        checkpoints, planned: as in `run_job`.

    Raises:
        BadRequestError: a rank refuses the job; raised on all ranks.
    """
    ranks = engine.ranks
    ranks.at("the start of a job", busy=True)
    try:
        with _held(engine, requests, outputs, checkpoints, planned):
            yield
        # No rank leaves before the files are written, as any may fail until then.
        ranks.control.all_gather_object("done")
    except (BadRequestError, CancelledError):
        ranks.at("idle")  # these errors end the job, not its ranks
        raise
    ranks.at("idle")


@contextmanager
def _held(
    engine: Engine,
    requests: Sequence[VideoRequest],
    outputs: Outputs | None,
    checkpoints: Checkpoints | None,
    planned: Recipe | None,
) -> Iterator[None]:
    """Check a job on all ranks, and hold its image, locks and mailbox while the block runs."""
    with ExitStack() as stack:
        problem, plans = "", list[Plan]()
        try:
            plans.extend(map(engine.plan, requests))
            stack.enter_context(engine.image_held(requests[-1]))
            if outputs is not None:
                outputs.check(requests[-1].videos)
                if len(requests) > 1:
                    check_room(requests[-1], len(requests) * requests[-1].videos)
        except BadRequestError as error:
            problem = str(error)
        _refuse_together(engine, problem)
        needed = planned is not None or checkpoints is not None
        recipes = [engine.recipe(plan) for plan in plans] if needed else []
        try:
            if planned is not None:
                planned.check_same(recipes[-1])
            if checkpoints is not None and outputs is not None:
                stack.enter_context(checkpoints.locked([recipe.latents.text for recipe in recipes]))
        except BadRequestError as error:
            problem = str(error)
        _refuse_together(engine, problem)
        stack.enter_context(engine.commanded())
        yield
        if outputs is not None and checkpoints is not None:
            try:
                checkpoints.discard()
            except OSError as error:
                log.warning("checkpoints: cannot remove them from %r: %s", str(checkpoints.root), error)


def _refuse_together(engine: Engine, problem: str) -> None:
    """Raise BadRequestError on all ranks if any of them has a problem."""
    problems = [told for told in engine.ranks.control.all_gather_object(problem) if told]
    if problems:
        raise BadRequestError(problems[0])


def follow_job(
    engine: Engine,
    request: VideoRequest,
    progress: Progress = silent,
    *,
    compared: bool,
    checkpoints: Checkpoints | None = None,
    planned: Recipe | None = None,
) -> Generation:
    """Follow a job on a rank that writes no files: make the same generations as the first, in its order."""
    requests = [request.full, request] if compared else [request]
    with _begun(engine, requests, None, checkpoints, planned):
        if compared:
            engine.warm_up(request)
            generate_shown(engine, request.full, [], progress, checkpoints)
        return generate_shown(engine, request, [], progress, checkpoints)


def generate_shown(
    engine: Engine,
    request: VideoRequest,
    sinks: Sequence[FrameSink],
    progress: Progress,
    checkpoints: Checkpoints | None = None,
) -> Generation:
    """Generate videos into `sinks`, shown by `progress`."""
    label = f"{request.spectrum}, seed {request.seed}"
    with progress(label, engine.plan(request).kinds) as on_step:
        return engine.generate(request, sinks, on_step, checkpoints)


@dataclass(frozen=True, slots=True)
class _Files:
    """Temporary files of a job, which get their names when all of them are done."""

    report: Path
    picture: Path
    videos: list[Path]


@contextmanager
def _files(outputs: Outputs, request: VideoRequest) -> Iterator[_Files]:
    """Open the job's files, which get their names together when the block succeeds."""
    with whole_files(list(outputs.all(request.videos)), overwrite=outputs.overwrite) as temporaries:
        report, picture, *videos = temporaries
        yield _Files(report, picture, videos)


def _generate_files(
    engine: Engine,
    request: VideoRequest,
    outputs: Outputs,
    files: _Files,
    progress: Progress,
    checkpoints: Checkpoints | None,
    also: Sequence[FrameSink] = (),
) -> tuple[Generation, Report]:
    """Generate into mp4 files, and into the sinks `also`, one per video, if given."""
    videos, config = outputs.videos(request.videos), engine.config
    bound = min(SILENCE, config.busy_timeout)
    with ExitStack() as stack:
        sinks: list[FrameSink] = [
            stack.enter_context(
                mp4_encoder(path, width=request.width, height=request.height, fps=config.fps, silence=bound)
            )
            for path in files.videos
        ]
        watches = [ColourWatch() for _ in videos]
        sinks = [Tee(*one) for one in zip(sinks, watches, *([also] if also else []), strict=True)]
        generation = generate_shown(engine, request, sinks, progress, checkpoints)
        for path, watch in zip(videos, watches, strict=True):
            generation.warnings += watch.warning(path.name)
        finishing = time.perf_counter()
    for path in files.videos:
        flush(path)
    report = build_report(
        ModelPart(name=engine.model.name, revision=engine.model.revision),
        generation,
        videos,
        load_seconds=engine.load_seconds,
        write_seconds=time.perf_counter() - finishing,
    )
    return generation, report


def _write(report: Report, files: _Files) -> Report:
    from runtime.reports.run_picture import write_picture

    files.report.write_text(report.to_json() + "\n", encoding="utf-8")
    write_picture(report, files.picture)
    return report
