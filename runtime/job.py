"""One request from start to files: videos, report and picture, with a comparison when it is wanted.

The first rank runs a job; the others follow it.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from runtime.checkpoint import Checkpoints
from runtime.denoise import StepRecord
from runtime.engine import Engine
from runtime.errors import BadRequestError
from runtime.files import Outputs, check_image
from runtime.generation import Generation
from runtime.quality import RawVideo, compare_videos
from runtime.report import Report, add_comparison, build_report, write_report
from runtime.request import VideoRequest
from runtime.video import ColourWatch, FrameSink, RawFrames, Tee, mp4_writer
from spectrum import StepKind

OnStep = Callable[[StepRecord], None]
Progress = Callable[[str, Sequence[StepKind]], AbstractContextManager[OnStep]]
"""Opens a display for one generation, given its name and the kind of each of its steps."""


@contextmanager
def silent(label: str, kinds: Sequence[StepKind]) -> Iterator[OnStep]:
    """The `Progress` that shows nothing."""
    yield lambda _: None


def run_job(
    engine: Engine,
    request: VideoRequest,
    outputs: Outputs,
    progress: Progress = silent,
    checkpoints: Checkpoints | None = None,
) -> Report:
    """Generate and write the videos, the report and the picture.

    Args:
        checkpoints: kept while it runs, and removed when all is written.

    Raises:
        BadRequestError: the request does not fit the model, or a file cannot be written; nothing was started.
        JobFailedError: a file could not be written to the end.
    """
    with _begun(engine, request, outputs, checkpoints):
        _, report = _generate_files(engine, request, outputs, progress, checkpoints)
        return _write(report, outputs)


def run_compared_job(
    engine: Engine,
    request: VideoRequest,
    outputs: Outputs,
    progress: Progress = silent,
    checkpoints: Checkpoints | None = None,
) -> Report:
    """As `run_job`, after running the full sampler on the same request, and measure against it.

    The transformer is run once beforehand, so that neither time holds what a process's first forward sets up.
    """
    with (
        _begun(engine, request, outputs, checkpoints),
        raw_videos(request, request.videos) as ours,
        raw_videos(request, request.videos) as theirs,
    ):
        engine.warm_up(request)
        full = generate_shown(engine, request.full, theirs.sinks, progress, checkpoints)
        generation, report = _generate_files(engine, request, outputs, progress, checkpoints, ours.sinks)
        ours.flush()
        theirs.flush()
        measured = [compare_videos(a, b) for a, b in zip(ours.videos, theirs.videos, strict=True)]
        add_comparison(report, generation, full, measured)
        return _write(report, outputs)


@contextmanager
def _begun(
    engine: Engine, request: VideoRequest, outputs: Outputs | None, checkpoints: Checkpoints | None
) -> Iterator[None]:
    """Begin on all ranks or on none, and end together. The rank with `outputs` holds the checkpoints
    meanwhile; when all went well, it removes them.

    Raises:
        BadRequestError: on all ranks, if any of them refuses.
    """
    with ExitStack() as stack:
        problem = ""
        try:
            engine.plan(request)
            if outputs is not None:
                outputs.check(request.videos)
                check_image(request.image)
                if checkpoints is not None:
                    stack.enter_context(checkpoints.locked())
        except BadRequestError as error:
            problem = str(error)
        problems = [told for told in engine.ranks.control.tell(problem) if told]
        if problems:
            raise BadRequestError(problems[0])
        stack.enter_context(engine.commanded())
        yield
        if outputs is not None and checkpoints is not None:
            checkpoints.remove()
    # Nobody leaves before the files are written: a rank may fail until then.
    engine.ranks.control.tell("done")


def follow_job(
    engine: Engine,
    request: VideoRequest,
    progress: Progress = silent,
    *,
    compared: bool,
    checkpoints: Checkpoints | None = None,
) -> Generation:
    """The part of ranks that write no files: the same generations in the same order as on the first."""
    with _begun(engine, request, None, checkpoints):
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
    """Generate into `sinks` while `progress` shows it."""
    label = f"{request.spectrum}, seed {request.seed}"
    with progress(label, engine.plan(request).kinds) as on_step:
        return engine.generate(request, sinks, on_step, checkpoints)


def _generate_files(
    engine: Engine,
    request: VideoRequest,
    outputs: Outputs,
    progress: Progress,
    checkpoints: Checkpoints | None,
    also: Sequence[FrameSink] = (),
) -> tuple[Generation, Report]:
    """Generate into mp4 files and into the sinks `also`, one per video where there are any."""
    videos = outputs.videos(request.videos)
    with ExitStack() as stack:
        sinks: list[FrameSink] = [
            stack.enter_context(
                mp4_writer(path, width=request.width, height=request.height, fps=engine.config.fps)
            )
            for path in videos
        ]
        watches = [ColourWatch() for _ in videos]
        sinks = [Tee(*one) for one in zip(sinks, watches, *([also] if also else []), strict=True)]
        generation = generate_shown(engine, request, sinks, progress, checkpoints)
        for path, watch in zip(videos, watches, strict=True):
            generation.warnings += watch.warning(path.name)
        finishing = time.perf_counter()
    return generation, build_report(engine, generation, videos, time.perf_counter() - finishing)


def _write(report: Report, outputs: Outputs) -> Report:
    from runtime.picture import write_picture

    write_report(report, outputs.report)
    write_picture(report, outputs.picture)
    return report


@dataclass(frozen=True, slots=True)
class RawSet:
    """Raw files of one request's videos, and the sinks that fill them."""

    videos: list[RawVideo]
    files: list[RawFrames]

    @property
    def sinks(self) -> Sequence[FrameSink]:
        return self.files

    def flush(self) -> None:
        for file in self.files:
            file.flush()


@contextmanager
def raw_videos(request: VideoRequest, count: int) -> Iterator[RawSet]:
    """Raw files for `count` videos of the size of `request`, removed at the end."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lockstep-")))
        paths = [folder / f"{number}.rgb" for number in range(count)]
        files = [RawFrames(stack.enter_context(path.open("wb"))) for path in paths]
        yield RawSet([RawVideo(path, request.width, request.height) for path in paths], files)
