"""Builds jobs and requests from what click has parsed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from launch.commands.prompts import DEFAULT_OUT, NAMED, filled, read_requests
from runtime.errors import BadRequestError
from runtime.files.checks import check_apart
from runtime.files.text import user_path
from runtime.forecasting.presets import load_preset
from runtime.jobs.batch import Batch, refuse_all
from runtime.jobs.job import Job
from runtime.jobs.job import inputs_of as inputs_of_request
from runtime.jobs.options import JobOptions
from runtime.models.configs import open_config
from runtime.models.folder import local_revision
from runtime.request.config import Config, is_path
from runtime.request.video_request import VideoRequest

_EXPERTS = ("high", "low")


def build_job(*, lora: Sequence[tuple[str, float]] = (), **given: Any) -> Job:
    """Build the job that the options of `generate` describe.

    Args:
        lora: files and scales; a file may have `high:` or `low:` before it, the expert that it is for.
        given: other options by name; None means not given.

    Raises:
        BadRequestError: an option is out of bounds, or options contradict each other.
    """
    return JobOptions.parse(**given_only(given), lora=[_lora(file, scale) for file, scale in lora]).job()


def build_batch(*, prompt: str | None, prompts: Path | None = None, **given: Any) -> Batch:
    """Build the jobs that the options of `generate` describe: one, or one for each request of a file.

    Args:
        prompt: prompt of a single job.
        prompts: file of prompts.
        given: options as of `build_job`; a request of the file may say otherwise.

    Raises:
        BadRequestError: neither or both of `prompt` and `prompts` are given, or a job is not acceptable.
    """
    if (prompt is None) == (prompts is None):
        raise BadRequestError("prompt: give either PROMPT, or --prompts with a file of prompts")
    if prompts is None:
        given["out"] = given.get("out") or Path("video.mp4")
        return Batch([build_job(prompt=prompt, **given)])
    return _batch_of(prompts, given)


def _batch_of(prompts: Path, given: dict[str, Any]) -> Batch:
    """Build one job for each request of a file; all problems are told at once."""
    lines = read_requests(prompts)
    given["out"] = given.get("out") or DEFAULT_OUT
    options = _options(given)
    config = options(prompt="any", out=Path("any.mp4")).open_config()
    revision = cache(local_revision)  # of a model that all of them have
    jobs, problems = [], []
    for line in lines:
        try:
            templates = {name: one for name in NAMED if (one := line.fields.get(name) or given.get(name))}
            names = dict(filled(line, templates, line.fields.get("seed", given.get("seed") or 0)))
            jobs.append(options(**{**line.fields, **names}).job(config, revision))
        except BadRequestError as error:
            problems.append(f"{line.where}{error}")
    refuse_all(problems)
    inputs = {prompts: "prompts"}
    for job in jobs:
        check_apart(job.outputs.touched(job.request.videos), inputs)
    return Batch(jobs, [line.where for line in lines])


def _options(given: dict[str, Any]) -> Callable[..., JobOptions]:
    """Make the options of a job from those of the command line and those of one request."""
    lora = [_lora(file, scale) for file, scale in given.pop("lora", ())]
    said = {name: one for name, one in given_only(given).items() if name not in NAMED}
    return lambda **own: JobOptions.parse(**{**said, **own}, lora=lora)


def _lora(given: str, scale: float) -> dict[str, Any]:
    expert, _, file = given.partition(":")
    if expert in _EXPERTS and file:
        return {"file": str(user_path(file)), "scale": scale, "expert": expert}
    return {"file": given, "scale": scale}


def build_request(config: Config, prompt: str, **given: Any) -> VideoRequest:
    """Build a request from options over the config's defaults; None means not given.

    Raises:
        BadRequestError: a field is out of bounds.
    """
    return config.request(prompt, **given_only(given))


def check_given(
    config: str | None,
    prompts: Sequence[str] = ("any",),
    *,
    model: str | None = None,
    revision: str | None = None,
    presets: Sequence[str] = (),
    **given: Any,
) -> None:
    """Refuse a config, presets or requests before anything slow is imported for them.

    Raises:
        BadRequestError: see `build_request`, `open_config` and `load_preset`.
    """
    settings = open_config(config, model=model, revision=revision)
    for prompt in prompts:
        build_request(settings, prompt, **given)
    for preset in presets:
        load_preset(preset)


def given_only(given: dict[str, Any]) -> dict[str, Any]:
    """Return the options that are given, with the size as width and height."""
    said = {name: value for name, value in given.items() if value is not None}
    if "size" in said:
        said["width"], said["height"] = said.pop("size")
    return said


def inputs_of(config: str | None, settings: Config, request: VideoRequest) -> dict[Path, str]:
    """Input files and folders of a command on this machine → the option that names each.

    Args:
        config: name or path of the config; None if it is not named.
        settings: the config itself.
        request: a request of the command.
    """
    own = {Path(config): "config"} if config is not None and is_path(config) else {}
    return own | inputs_of_request(settings, request, load_preset(request.spectrum))
