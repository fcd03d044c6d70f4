"""Command-line options → what is to be done, checked before anything is started."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from launch.shell.defaults import usual_timeout
from runtime.checkpoint.folder import Checkpoints
from runtime.errors import BadRequestError
from runtime.files.atomic import Outputs, check_apart
from runtime.files.problems import explain
from runtime.files.text import read_json
from runtime.forecasting.presets import load_preset
from runtime.models.folder import find_local
from runtime.models.wan.lora import check_loras
from runtime.parallel.topology import Degrees, Topology
from runtime.request.config import Config, Lora, is_embedded, is_path, load_config
from runtime.request.images import check_image
from runtime.request.video_request import VideoRequest


@dataclass(frozen=True, slots=True)
class Job:
    """What `generate` was asked to do, checked as far as it can be before the model loads.

    Attributes:
        ranks: how many were asked for, or as many as the degrees take; None if nothing was said.
        checkpoints: where the state is kept while the job runs; None for nowhere.
        timeout: seconds within which the failure of one rank ends all.
    """

    config: Config
    request: VideoRequest
    outputs: Outputs
    compare: bool
    ranks: int | None
    degrees: Degrees
    checkpoints: Checkpoints | None
    timeout: float

    @property
    def world(self) -> int:
        """Ranks of the group that runs it."""
        return self.ranks or 1

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

    def going_on(self) -> Job:
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
        return self.going_on() if kept is not None and kept.resume and kept.left else self

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
        overwrite = (self.going_on() if left else self).outputs.overwrite
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


def build_job(
    *,
    config: str,
    prompt: str,
    out: Path,
    report: Path | None,
    overwrite: bool,
    compare: bool,
    ranks: int | None,
    ulysses: int | None,
    ring: int | None,
    cfg: int | None,
    attention: str | None,
    shard: bool | None,
    compile: bool | None,
    lora: Sequence[tuple[str, float]],
    timeout: float | None,
    busy_timeout: float | None,
    checkpoints: Path | None,
    checkpoint_every: int,
    resume: bool,
    **given: Any,
) -> Job:
    """The job of the given options.

    Raises:
        BadRequestError: a field is out of its bounds, or the options do not fit each other.
    """
    settings = _override(
        load_config(config),
        attention=attention,
        shard=shard,
        compile=compile,
        lora=lora,
        busy_timeout=busy_timeout,
    )
    request = build_request(settings, prompt, **given)
    load_preset(request.spectrum).check_request(settings.windowed(request))
    degrees = Degrees(cfg=cfg, ring=ring, ulysses=ulysses)
    world = ranks or (degrees.product if degrees != Degrees() else None)
    if world is not None and settings.architecture is not None:
        heads = settings.architecture.heads
        topology = Topology.choose(world, heads=heads, guided=request.guided, wanted=degrees)
        topology.check(heads=heads, tokens=None, guided=request.guided)
    default = usual_timeout(settings.compile)
    outputs = Outputs.named(out, report, overwrite=overwrite)
    check_apart(outputs.all(request.videos), inputs_of(config, settings, request))
    kept = None
    if checkpoint_every:
        folder = Checkpoints.folder_of(out, checkpoints)
        kept = Checkpoints(folder, every=checkpoint_every, resume=resume, overwrite=overwrite and not resume)
    if resume and kept is None:
        raise BadRequestError(
            "resume: without checkpoints (--checkpoint-every 0) there is nothing to go on from"
        )
    return Job(settings, request, outputs, compare, world, degrees, kept, timeout or default)


def inputs_of(config: str, settings: Config, request: VideoRequest) -> dict[Path, str]:
    """Files and folders on this machine that a request is made from → the field that each is of."""
    model = find_local(settings)
    named = {
        "config": config if is_path(config) else None,
        "spectrum": request.spectrum if is_path(request.spectrum) else None,
        "image": request.image,
        "model": None if model is None else str(model),
    }
    files = {Path(name): field for field, name in named.items() if name is not None}
    return files | {Path(one.file): "lora" for one in settings.lora}


def _override(
    config: Config,
    *,
    attention: str | None,
    shard: bool | None,
    compile: bool | None,
    lora: Sequence[tuple[str, float]],
    busy_timeout: float | None,
) -> Config:
    """The config with what the command line says instead."""
    changes: dict[str, Any] = {}
    if lora:
        changes["lora"] = tuple(Lora(file=str(Path(file).absolute()), scale=scale) for file, scale in lora)
    if attention is not None:
        changes["attention"] = attention
    if compile is not None:
        changes["compile"] = compile
    if busy_timeout is not None:
        changes["busy_timeout"] = busy_timeout
    if shard is not None:
        changes["memory"] = config.memory.model_copy(
            update={"transformer": "shard" if shard else "replicate"}
        )
    settings = config.model_copy(update=changes)
    check_loras(settings)
    return settings


def build_request(config: Config, prompt: str, **given: Any) -> VideoRequest:
    """The request of the given options over the config's defaults; `None` means not given.

    Raises:
        BadRequestError: a field is out of its bounds.
    """
    size = given.pop("size", None)
    if size is not None:
        given["width"], given["height"] = size
    return config.request(prompt, **{name: value for name, value in given.items() if value is not None})
