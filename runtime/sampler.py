"""Samplers: diffusers' schedulers, configured for flow matching."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import torch
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


def sampler_settings(sampler: SchedulerMixin) -> dict[str, str]:
    """Settings of a sampler that differ from its class's own defaults, sorted, as text.

    Two samplers that compute the same have the same settings here: whichever process made them, whether
    their file was written before a setting existed, and whatever diffusers keeps in the config for itself
    (names that begin with an underscore, among them a list whose order is that of a set).
    """
    parameters = inspect.signature(type(sampler).__init__).parameters
    defaults = {name: _as_text(parameter.default) for name, parameter in parameters.items()}
    config = {name: _as_text(value) for name, value in sampler.config.items() if name in defaults}
    return {name: value for name, value in sorted(config.items()) if value != defaults[name]}


def _as_text(value: Any) -> str:
    """A setting as text; a sequence reads the same as list, tuple or array."""
    return str(
        [_as_text(one) for one in value]
        if hasattr(value, "__len__") and not isinstance(value, str | dict)
        else value
    )


def sampler_state(sampler: SchedulerMixin) -> dict[str, Any]:
    """What a sampler has become since it was made: plain values, tensors, and lists of them."""
    return {
        name: list(value) if isinstance(value, list) else value
        for name, value in vars(sampler).items()
        if name != "_internal_dict"
    }


def restore_sampler(sampler: SchedulerMixin, state: dict[str, Any], device: torch.device) -> None:
    """Make `sampler`, freshly made with the same settings, what it was. Its tables stay where they are."""
    for name, value in state.items():
        now = getattr(sampler, name, None)
        if isinstance(now, torch.Tensor) and now.shape == getattr(value, "shape", None):
            setattr(sampler, name, value.to(now.device))  # a table: the sampler knows where it wants it
        else:
            setattr(sampler, name, _moved(value, device))


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, list):
        return [_moved(one, device) for one in value]
    return value.to(device) if isinstance(value, torch.Tensor) else value


def _shared(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that mean the same to every sampler."""
    return {key: settings[key] for key in ("num_train_timesteps",) if key in settings}
