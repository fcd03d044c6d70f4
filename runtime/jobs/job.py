"""Jobs: one request with everything that is needed to carry it out, for any process that may do so."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from runtime.checkpoint.folder import Checkpoints
from runtime.errors import BadRequestError
from runtime.files.problems import explain
from runtime.files.text import read_json
from runtime.forecasting.presets import load_preset
from runtime.models.folder import find_local, local_revision
from runtime.parallel.topology import Degrees
from runtime.recipe import Recipe
from runtime.request.config import Config, is_embedded, is_path
from runtime.request.images import check_image, image_digest
from runtime.request.outputs import Outputs
from runtime.request.video_request import VideoRequest


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
