"""Samplers: diffusers' schedulers, configured for flow matching."""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)

from runtime.configs import Scheduler
from runtime.errors import BadRequestError
from runtime.weights import ModelFolder, read_json


def load_scheduler(folder: ModelFolder, choice: Scheduler) -> SchedulerMixin:
    """The sampler of `choice`, configured for flow matching from the model's own settings."""
    settings = read_json(folder.path / "scheduler" / "scheduler_config.json")
    shift = choice.shift or settings.get("flow_shift") or settings.get("shift") or 1.0
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    match choice.kind:
        case "unipc":
            return UniPCMultistepScheduler.from_config({**_shared(settings), **flow})
        case "dpm++":
            return DPMSolverMultistepScheduler.from_config(
                {**_shared(settings), **flow, "algorithm_type": "dpmsolver++"}
            )
        case "euler":
            return FlowMatchEulerDiscreteScheduler.from_config({**_shared(settings), "shift": shift})
        case _:
            kind = getattr(diffusers, str(settings.get("_class_name")), None)
            if kind is None:
                raise BadRequestError(
                    f"model: {folder.name!r} cannot be used: unknown scheduler {settings.get('_class_name')}"
                )
            own_shift = {} if choice.shift is None else {"flow_shift": shift, "shift": shift}
            return kind.from_config({**settings, **own_shift})


def _shared(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that mean the same to every sampler."""
    return {key: settings[key] for key in ("num_train_timesteps",) if key in settings}
