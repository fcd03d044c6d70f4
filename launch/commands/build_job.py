"""Builds jobs and requests from what click has parsed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runtime.forecasting.presets import load_preset
from runtime.jobs.job import Job
from runtime.jobs.job import inputs_of as inputs_of_request
from runtime.jobs.options import JobOptions
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
    return JobOptions.parse(**_said(given), lora=[_lora(file, scale) for file, scale in lora]).job()


def _lora(given: str, scale: float) -> dict[str, Any]:
    expert, _, file = given.partition(":")
    if expert in _EXPERTS and file:
        return {"file": file, "scale": scale, "expert": expert}
    return {"file": given, "scale": scale}


def build_request(config: Config, prompt: str, **given: Any) -> VideoRequest:
    """Build a request from options over the config's defaults; None means not given.

    Raises:
        BadRequestError: a field is out of bounds.
    """
    return config.request(prompt, **_said(given))


def _said(given: dict[str, Any]) -> dict[str, Any]:
    """Return the options that are given, with the size as width and height."""
    said = {name: value for name, value in given.items() if value is not None}
    if "size" in said:
        said["width"], said["height"] = said.pop("size")
    return said


def inputs_of(config: str, settings: Config, request: VideoRequest) -> dict[Path, str]:
    """Input files and folders of a command on this machine → the option that names each.

    Args:
        config: name or path of the config.
        settings: the config itself.
        request: a request of the command.
    """
    own = {Path(config): "config"} if is_path(config) else {}
    return own | inputs_of_request(settings, request, load_preset(request.spectrum))
