"""One request from start to files: videos, report and picture, with a comparison when it is wanted.

The first rank runs a job; the others follow it.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from runtime.checkpoint.folder import Checkpoints
from runtime.engine import Engine
from runtime.errors import BadRequestError, CancelledError
from runtime.files.atomic import Outputs, flush, whole_files
from runtime.files.problems import explain
from runtime.files.text import read_json
from runtime.forecasting.presets import load_preset
from runtime.media.ffmpeg import SILENCE
from runtime.media.mp4 import ColourWatch, FrameSink, Tee, mp4_encoder
from runtime.media.quality import compare_videos
from runtime.media.raw import check_room, raw_videos
from runtime.models.folder import find_local, local_revision
from runtime.parallel.topology import Degrees
from runtime.recipe import Recipe
from runtime.reports.report import ModelPart, Report, add_comparison, build_report
from runtime.request.config import Config, is_embedded, is_path
from runtime.request.images import check_image, image_digest
from runtime.request.video_request import VideoRequest
from runtime.sampling.denoise import StepRecord
from runtime.sampling.plan import Generation, Plan
from spectrum import StepKind

log = logging.getLogger(__name__)

OnStep = Callable[[StepRecord], None]
Progress = Callable[[str, Sequence[StepKind]], AbstractContextManager[OnStep]]
"""Opens a display for one generation, given its name and the kind of each of its steps."""


@contextmanager
def silent(label: str, kinds: Sequence[StepKind]) -> Iterator[OnStep]:
    """The `Progress` that shows nothing."""
    yield lambda _: None


@dataclass(frozen=True, slots=True)
class Job:
    """What `generate` was asked to do, checked as far as it can be before the model loads.

    Attributes:
        ranks: how many were asked for, or as many as the degrees take; None if nothing was said.
        checkpoints: where the state is kept while the job runs; None for nowhere.
        timeout: seconds within which the failure of one rank ends all.
        recipe: what the video was to be made from when the job was planned; None asks for nothing.
    """

    config: Config
    request: VideoRequest
    outputs: Outputs
    compare: bool
    ranks: int | None
    degrees: Degrees
    checkpoints: Checkpoints | None
    timeout: float
    recipe: Recipe | None = None

    @property
    def world(self) -> int:
        """Ranks of the group that runs it."""
        return self.ranks or 1

    def planned(self) -> Job:
        """The same job with the recipe of its files as they are now, as far as this machine has them.

        Raises:
            BadRequestError: one of them cannot be read.
        """
        request, preset = self.request, load_preset(self.request.spectrum)
        recipe = Recipe.of(
            self.config,
            request,
            preset,
            image=None if request.image is None else image_digest(request.image),
            revision=local_revision(self.config),
        )
        return replace(self, recipe=recipe)

    def check_files(self) -> None:
        """Refuse files that cannot be written; for the rank that writes them.

        Raises:
            BadRequestError: see `Outputs.check`, `Checkpoints.check` and `check_image`.
        """
        check_image(self.request.image)
        self.resumed().outputs.check(self.request.videos)
        if self.checkpoints is not None:
            self.checkpoints.check()

    def absolute(self) -> Job:
        """The same job for processes that run in other folders."""
        outputs, kept, request = self.outputs, self.checkpoints, self.request
        if is_path(request.spectrum):
            request = request.model_copy(update={"spectrum": str(Path(request.spectrum).absolute())})
        config = self.config
        folder = find_local(config)
        if folder is not None and not is_embedded(config.model):
            config = config.model_copy(update={"model": str(folder.absolute())})
        lora = tuple(one.model_copy(update={"file": str(Path(one.file).absolute())}) for one in config.lora)
        config = config.model_copy(update={"lora": lora})
        if request.image is not None:
            request = request.model_copy(update={"image": str(Path(request.image).absolute())})
        return replace(
            self,
            config=config,
            request=request,
            outputs=Outputs(outputs.video.absolute(), outputs.report.absolute(), outputs.overwrite),
            checkpoints=None if kept is None else replace(kept, root=kept.root.absolute()),
        )

    def retried(self) -> Job:
        """The same job, to be gone on with; it may replace a video that the attempt before made."""
        kept, overwrite = self.checkpoints, self.outputs.overwrite or self._is_made()
        return replace(
            self,
            outputs=replace(self.outputs, overwrite=overwrite),
            checkpoints=None if kept is None else replace(kept, resume=True),
        )

    def resumed(self) -> Job:
        """The same job; where it goes on from what an attempt before left, it may replace the files that this
        attempt made: it may have been killed between its report and its videos."""
        kept = self.checkpoints
        return self.retried() if kept is not None and kept.resume and kept.left else self

    def _is_made(self) -> bool:
        """Whether there is a report of this very request; it appears before the videos that it names."""
        own = self.absolute()
        try:
            report = read_json(own.outputs.report)
            made = (report["request"], report["videos"])
        except (OSError, ValueError, KeyError, TypeError):
            return False
        videos = [str(path) for path in own.outputs.videos(self.request.videos)]
        return bool(made == (own.request.model_dump(mode="json"), videos))

    def advice(self) -> str:
        """What makes the job go on after it was interrupted, as things are now."""
        kept, options = self.checkpoints, self._options_now()
        command = f"the same command{' with ' if options else ''}{' '.join(options)}"
        if kept is not None and kept.newest is not None:
            return f"{command} goes on from the last checkpoint"
        whole = "whole " if options else ""
        return f"no {whole}checkpoint is there: {command} starts again at the first step"

    def options_to_go_on(self) -> list[str] | None:
        """What its own options lack to go on from its checkpoints; None where there are none."""
        kept = self.checkpoints
        return None if kept is None or kept.newest is None else self._options_now()

    def _options_now(self) -> list[str]:
        """What its own options lack to be taken with what is there now."""
        kept = self.checkpoints
        left = kept is not None and kept.left
        options = ["--resume"] if kept is not None and left and not kept.resume else []
        overwrite = (self.retried() if left else self).outputs.overwrite
        if not overwrite and any(os.path.lexists(path) for path in self.outputs.all(self.request.videos)):
            options.append("--overwrite")
        return options

    def to_json(self) -> str:
        """Everything about it, for `from_json`."""
        return _JOB.dump_json(self).decode()

    @classmethod
    def from_json(cls, text: str | bytes) -> Job:
        """The job that `to_json` was asked of.

        Raises:
            BadRequestError: another version of Lockstep wrote it, and it means nothing to this one.
        """
        try:
            return _JOB.validate_json(text)
        except ValidationError as error:
            raise BadRequestError(explain(error, source="a job of another version")) from None


_JOB = TypeAdapter(Job)


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
        checkpoints: kept while it runs, and removed when all is written.
        planned: what the video is to be made from; what has changed since is refused.

    Raises:
        BadRequestError: the request does not fit the model, or a file cannot be written; nothing was started.
        JobFailedError: a file could not be written to the end.
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
    """As `run_job`, after running the full sampler on the same request, and measure against it.

    The transformer is run once beforehand, so that neither time holds what a process's first forward sets up.
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
    """Begin on all ranks or on none, and end together. The rank with `outputs` holds the checkpoints
    meanwhile; when all went well, it removes them.

    Args:
        requests: those of the job's generations, the one that is written last.

    Raises:
        BadRequestError: on all ranks, if any of them refuses.
    """
    ranks = engine.ranks
    ranks.at("the start of a job", busy=True)
    try:
        with _held(engine, requests, outputs, checkpoints, planned):
            yield
        # Nobody leaves before the files are written: a rank may fail until then.
        ranks.control.all_gather_object("done")
    except (BadRequestError, CancelledError):
        ranks.at("idle")  # they end the job, not its ranks
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
    """The part of `_begun` that is left before all ranks end together: what a job holds while it runs."""
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
        recipes = [engine.recipe(plan) for plan in plans]
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
                log.warning("checkpoints: cannot remove those in %r: %s", str(checkpoints.root), error)


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
    """The part of ranks that write no files: the same generations in the same order as on the first."""
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
    """Generate into `sinks` while `progress` shows it."""
    label = f"{request.spectrum}, seed {request.seed}"
    with progress(label, engine.plan(request).kinds) as on_step:
        return engine.generate(request, sinks, on_step, checkpoints)


@dataclass(frozen=True, slots=True)
class _Files:
    """Where the files of a job are until all of them are done and get their names."""

    report: Path
    picture: Path
    videos: list[Path]


@contextmanager
def _files(outputs: Outputs, request: VideoRequest) -> Iterator[_Files]:
    """The job's files; they get their names, one right after the other, when the block ends well."""
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
    """Generate into mp4 files and into the sinks `also`, one per video where there are any."""
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
