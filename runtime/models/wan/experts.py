"""Wan's transformers as experts: Wan2.2 A14B has one for high noise and one for low; others have only one."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from runtime.models.base import ExpertSettings
from runtime.models.wan.settings import SchedulerSettings, TransformerSettings, WanIndex
from runtime.request.video_request import VideoRequest

HIGH_NOISE: Final = "transformer"
LOW_NOISE: Final = "transformer_2"
_WARMUP: Final = 2  # steps, so that a straight line can be drawn through what is remembered


def expert_settings(path: Path) -> tuple[ExpertSettings, ...]:
    """Settings of the transformers of the model in `path`, in the order of their steps; missing ones, too.

    The first is for high noise: timesteps from `boundary_ratio` of the training's on, as diffusers compares
    them. A request's `guidance` is its scale, and `guidance_2` that of the second.

    Source: `diffusers.WanPipeline.__call__`.
    """
    index = WanIndex.read(path / "model_index.json")
    if index.boundary_ratio is None:
        return (ExpertSettings(HIGH_NOISE),)
    sampler = SchedulerSettings.read(path / "scheduler" / "scheduler_config.json")
    boundary, present = index.boundary_ratio * sampler.num_train_timesteps, index.folders
    return (
        ExpertSettings(HIGH_NOISE, boundary, present=HIGH_NOISE in present),
        ExpertSettings(LOW_NOISE, guidance=_second, warmup=_WARMUP, present=LOW_NOISE in present),
    )


def read_transformers(path: Path) -> dict[str, TransformerSettings]:
    """Read the settings of the transformers that the model in `path` has, by the names of their folders.

    Raises:
        OSError, ValueError: a file is missing or invalid, or two transformers differ.
    """
    folders = WanIndex.read(path / "model_index.json").folders
    found = {name: TransformerSettings.read(path / name / "config.json") for name in folders}
    first, *others = found.items()
    for name, settings in others:
        fields = [field for field in type(settings).model_fields if field != "class_name"]
        different = [field for field in fields if getattr(settings, field) != getattr(first[1], field)]
        if different:
            raise ValueError(f"its {first[0]} and {name} differ in {', '.join(different)}")
    return found


def read_transformer(path: Path) -> TransformerSettings:
    """Read the settings that all transformers of the model in `path` have; see `read_transformers`."""
    return next(iter(read_transformers(path).values()))


def _second(request: VideoRequest) -> float:
    return request.second_guidance
