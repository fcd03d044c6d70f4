"""Samplers: diffusers' schedulers, configured for flow matching and accepted if they pass a trial run."""

from __future__ import annotations

import io
import logging
import math
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from inspect import signature
from typing import Any, get_args, get_origin, get_type_hints

import diffusers
import numpy as np
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)

from runtime.errors import BadRequestError, named
from runtime.files.text import read_json
from runtime.models.folder import ModelFolder
from runtime.request.sampler import SamplerConfig

_PROBED_STEPS = 10
_MOST_TIMESTEPS = 100_000  # of training; samplers allocate tables of this size
_CLOSE = 0.25  # relative; a sampler of another kind misses by far more
_CLASSES: dict[Any, str] = {
    **dict.fromkeys((int, float, bool), "a number"),
    str: "text",
    **dict.fromkeys((list, tuple, np.ndarray), "a list"),
    type(None): "null",
}
Timesteps = Callable[[dict[str, Any], int, int], dict[str, Any]]
"""Sampler settings, number of steps, number of tokens → further arguments of `set_timesteps`."""

_Make = Callable[[dict[str, Any]], SchedulerMixin]

_PROBED_TOKENS = 1024
_REMEDY = "name another in the config, such as `scheduler: {kind: unipc, shift: 3.0}`"


class _IncapableError(Exception):
    """A sampler cannot be used; the message says why."""


def _no_more(settings: dict[str, Any], steps: int, tokens: int) -> dict[str, Any]:
    return {}


def load_sampler(
    folder: ModelFolder, choice: SamplerConfig, timesteps: Timesteps = _no_more
) -> SchedulerMixin:
    """Load the sampler of `choice`, configured for flow matching from the model's own settings.

    Args:
        folder: the model.
        choice: the config's choice of a sampler.
        timesteps: `timesteps` of the model's family.

    Raises:
        BadRequestError: a setting has the wrong type, or the sampler cannot be used: it is not deterministic
            or not made for flow matching, or its state cannot be stored in a checkpoint.
    """
    settings = read_json(folder.path / "scheduler" / "scheduler_config.json")
    kind, wanted = _wanted(settings, choice)
    if kind is None:
        raise _refusal(folder, str(settings.get("_class_name")), "diffusers has no such sampler")
    if problem := _wrong_setting(kind, wanted):
        raise _refusal(folder, kind.__name__, problem)
    given = timesteps(wanted, choice.steps or _PROBED_STEPS, _PROBED_TOKENS) | listed_steps(choice, wanted)
    if wanted.get("use_dynamic_shifting") is True and "mu" not in given:
        problem = "use_dynamic_shifting: true given; it needs `mu`, which pipelines of this model do not have"
        raise _refusal(folder, kind.__name__, problem)
    try:
        sampler = kind.from_config(wanted)
    except Exception as error:  # diffusers' classes raise anything for settings that they do not support
        raise _refusal(folder, kind.__name__, named(error) + _own(kind, wanted)) from None
    if problem := _incapable(kind.from_config, dict(sampler.config), given):
        raise _refusal(folder, kind.__name__, problem + _own(kind, wanted))
    return sampler


def _wanted(
    settings: dict[str, Any], choice: SamplerConfig
) -> tuple[type[SchedulerMixin] | None, dict[str, Any]]:
    """Choose the sampler's class and settings; the class is None if the model names none."""
    own = None if choice.timesteps else settings.get("flow_shift", settings.get("shift"))
    shift = choice.shift or (1.0 if own is None else own)
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    match choice.kind:
        case "unipc":
            return UniPCMultistepScheduler, {**_shared(settings), **flow}
        case "dpm++":
            return DPMSolverMultistepScheduler, {**_shared(settings), **flow, "algorithm_type": "dpmsolver++"}
        case "euler":
            return FlowMatchEulerDiscreteScheduler, {**_shared(settings), "shift": shift}
        case _:
            kind = getattr(diffusers, str(settings.get("_class_name")), None)
            if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
                return None, settings
            return kind, {
                **settings,
                **({} if choice.shift is None else {"flow_shift": shift, "shift": shift}),
            }


def listed_steps(choice: SamplerConfig, settings: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `set_timesteps` for the steps that a config lists; empty if it lists none.

    Args:
        choice: the config's choice of a sampler.
        settings: settings of the sampler.
    """
    if choice.sigmas is not None:
        return {"sigmas": np.array(choice.sigmas)}
    if choice.timesteps is not None:
        most = settings.get("num_train_timesteps", 1000)
        return {"sigmas": np.array(choice.timesteps) / most, "timesteps": np.array(choice.timesteps)}
    return {}


def _refusal(folder: ModelFolder, sampler: str, problem: str) -> BadRequestError:
    return BadRequestError(
        f"model: {folder.name!r} cannot be used: its sampler {sampler}: {problem}; {_REMEDY}"
    )


def _own(kind: type[SchedulerMixin], settings: dict[str, Any]) -> str:
    """Write the settings that differ from the class's defaults, in parentheses."""
    defaults = {one.name: one.default for one in signature(kind.__init__).parameters.values()}
    own = [f"{name}: {value}" for name, value in settings.items() if defaults.get(name, value) != value]
    return f" ({', '.join(own)})" if own else ""


def _wrong_setting(kind: type[SchedulerMixin], settings: dict[str, Any]) -> str:
    """Describe a setting whose value or type the class's parameters do not allow; empty if there is none."""
    try:
        hints = get_type_hints(kind.__init__)
    except NameError:  # a type that is imported only for type checkers
        hints = {}
    for name, value in settings.items():
        if isinstance(value, float) and not math.isfinite(value):
            return f"{name}: {value} given; it must be finite"
        if name.endswith("shift") and isinstance(value, int | float) and not value > 0:
            return f"{name}: {value} given; it must be above 0"
        if name == "num_train_timesteps" and isinstance(value, int) and not 0 < value <= _MOST_TIMESTEPS:
            return f"{name}: {value} given; it must be from 1 to {_MOST_TIMESTEPS}"
        allowed = {_CLASSES.get(_plain(one)) for one in _alternatives(hints.get(name))}
        if value is not None and allowed <= {*_CLASSES.values()} and _CLASSES.get(type(value)) not in allowed:
            return f"{name}: {value!r} given; it must be {' or '.join(sorted(str(one) for one in allowed))}"
    return ""


def _alternatives(hint: Any) -> tuple[Any, ...]:
    """List the members of a union, or the types of a `Literal`'s values."""
    members = get_args(hint)
    if hint is None or not members or get_origin(hint) in _CLASSES:
        return (hint,) if hint is not None else (object,)
    return tuple(one if isinstance(one, type) or get_origin(one) else type(one) for one in members)


def _plain(hint: Any) -> Any:
    return get_origin(hint) or hint


def _incapable(make: _Make, config: dict[str, Any], given: dict[str, Any]) -> str:
    """Try a sampler; return the reason why it cannot be used, empty if it can."""
    try:
        attempt = partial(_try, make, pickle.dumps((config, given)))
    except Exception:  # a setting may be anything, such as a function
        attempt = partial(_try_settings, make, config, given)
    try:
        attempt()
    except _IncapableError as error:
        return str(error)
    return ""


@cache  # as every engine of a process would find the same; what is refused is tried again
def _try(make: _Make, pickled: bytes) -> None:
    """Try a sampler whose config and arguments are given as `pickle` writes them; see `_try_settings`."""
    _try_settings(make, *pickle.loads(pickled))


def _try_settings(make: _Make, config: dict[str, Any], given: dict[str, Any]) -> None:
    """Try a sampler on a small tensor.

    At every step the velocity is that of the straight line from noise to a clean sample, which a sampler for
    flow matching follows.

    Args:
        make: makes a sampler of its config.
        config: settings of the sampler.
        given: arguments of `set_timesteps`.

    Raises:
        _IncapableError: the sampler cannot be used; the message says why.
    """

    def fresh() -> SchedulerMixin:
        return make(config)

    numbers = torch.Generator().manual_seed(0)
    noise = torch.randn((1, 4, 1, 4, 4), generator=numbers)
    clean = torch.rand(noise.shape, generator=numbers) - 0.5
    try:
        ends = [_sampled(fresh, given, noise, noise - clean, seed) for seed in (1, 2)]
    except Exception as error:  # a class that is no such sampler may raise anything
        raise _IncapableError(f"it cannot be used as the model's pipelines use it: {named(error)}") from None
    if not ends[0].isfinite().all():
        raise _IncapableError("with its settings, its result is not finite")
    if not torch.equal(*ends):
        raise _IncapableError("it adds noise at its steps, so a seed would not mean one video")
    off, way = ends[0] - clean, noise - clean
    left = float((off * way).sum() / way.square().sum())  # of the way; some end a little before the sample
    if not (-_CLOSE < left < 1 - _CLOSE and float((off - left * way).norm()) < _CLOSE * float(clean.norm())):
        wanted = "prediction_type: flow_prediction, use_flow_sigmas: true"
        raise _IncapableError(f"it does not sample flow matching ({wanted})")
    try:
        kept = _sampled(fresh, given, noise, noise - clean, 1, interrupted=True)
    except Exception as error:  # pickle raises AttributeError, too
        raise _IncapableError(f"its state cannot be stored in a checkpoint: {named(error)}") from None
    if not torch.equal(kept, ends[0]):
        raise _IncapableError("its state cannot be restored from a checkpoint")


def _sampled(
    fresh: Callable[[], SchedulerMixin],
    given: dict[str, Any],
    noise: torch.Tensor,
    velocity: torch.Tensor,
    seed: int,
    *,
    interrupted: bool = False,
) -> torch.Tensor:
    """Sample from `noise` to the end.

    Args:
        seed: seed of torch's global generator, which a sampler should not draw from.
        interrupted: whether to store the sampler's state in the middle, and restore it in a fresh sampler.
    """
    sample, cpu = noise, torch.device("cpu")
    with torch.random.fork_rng(devices=[]), _quiet():
        torch.manual_seed(seed)
        sampler = _begun(fresh(), given)
        for number, timestep in enumerate(sampler.timesteps):
            if interrupted and number == len(sampler.timesteps) // 2:
                stored = io.BytesIO()
                torch.save(sampler_state(sampler), stored)
                stored.seek(0)
                sampler = _begun(fresh(), given)
                restore_sampler(sampler, torch.load(stored, weights_only=True), cpu)
            sample = sampler.step(velocity, timestep, sample, return_dict=False)[0]
    return sample


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence diffusers' warnings about a sampler that is only tried."""
    logger = logging.getLogger("diffusers")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _begun(sampler: SchedulerMixin, given: dict[str, Any]) -> SchedulerMixin:
    sampler.set_timesteps(len(given["sigmas"]) if "sigmas" in given else _PROBED_STEPS, **given)
    sampler.set_begin_index(0)
    return sampler


def begin_sampler(
    sampler: SchedulerMixin, steps: int, device: torch.device | None, given: dict[str, Any] | None = None
) -> None:
    """Set a sampler's timesteps and begin at the first.

    Args:
        sampler: the sampler.
        steps: number of steps.
        device: device of its timesteps.
        given: further arguments of `set_timesteps`.

    Raises:
        BadRequestError: the sampler does not support this number of steps.
    """
    try:
        sampler.set_timesteps(steps, device=device, **(given or {}))
        sampler.set_begin_index(0)
        ordered = bool(sampler.timesteps.isfinite().all()) and len(sampler.timesteps) >= steps
    except Exception as error:  # as of `load_sampler`
        ordered, said = False, named(error)
    else:
        said = "it has fewer"
    if not ordered:
        raise BadRequestError(f"steps: {steps} given; the sampler {type(sampler).__name__} refuses: {said}")


def noise_levels(sampler: SchedulerMixin) -> list[float]:
    """Noise level σ of each of a sampler's timesteps, within 1 … 0, and 0 after the last.

    Samplers that keep none of their own have timesteps in proportion to them.
    """
    timesteps = sampler.timesteps.flatten().tolist()
    levels = getattr(sampler, "sigmas", torch.empty(0)).flatten().tolist()[: len(timesteps)]
    if len(levels) < len(timesteps):
        levels = [time / sampler.config.get("num_train_timesteps", 1000) for time in timesteps]
    return [min(max(level, 0.0), 1.0) for level in levels] + [0.0]


def sampler_settings(sampler: SchedulerMixin) -> dict[str, str]:
    """Settings of a sampler that differ from its class's own defaults, sorted, as text.

    Samplers that compute the same have equal settings here, even if their files were written before a setting
    existed. Names that begin with an underscore are left out: diffusers keeps them for itself, and the order
    of one of its lists differs from process to process.
    """
    parameters = signature(type(sampler).__init__).parameters
    defaults = {name: _as_text(parameter.default) for name, parameter in parameters.items()}
    config = {name: _as_text(value) for name, value in sampler.config.items() if name in defaults}
    return {name: value for name, value in sorted(config.items()) if value != defaults[name]}


def _as_text(value: Any) -> str:
    """Write a setting as text; lists, tuples and arrays of equal values read the same."""
    return str(
        [_as_text(one) for one in value]
        if hasattr(value, "__len__") and not isinstance(value, str | dict)
        else value
    )


def sampler_state(sampler: SchedulerMixin) -> dict[str, Any]:
    """State of a sampler: plain values, tensors, and lists of them.

    Callable attributes are settings, not state.
    """
    return {
        name: list(value) if isinstance(value, list) else value
        for name, value in vars(sampler).items()
        if name != "_internal_dict" and not callable(value)
    }


def restore_sampler(sampler: SchedulerMixin, state: dict[str, Any], device: torch.device) -> None:
    """Restore the state of a sampler.

    Args:
        sampler: a fresh sampler with the same settings; its tables stay on their devices.
        state: the state, from `sampler_state`.
        device: device of its other tensors.
    """
    for name, value in state.items():
        now = getattr(sampler, name, None)
        if isinstance(now, torch.Tensor) and now.shape == getattr(value, "shape", None):
            setattr(sampler, name, value.to(now.device))  # a table, whose device the sampler has chosen
        else:
            setattr(sampler, name, _moved(value, device))


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, list):
        return [_moved(one, device) for one in value]
    return value.to(device) if isinstance(value, torch.Tensor) else value


def _shared(settings: dict[str, Any]) -> dict[str, Any]:
    """Keep the settings that mean the same to every sampler."""
    return {key: settings[key] for key in ("num_train_timesteps",) if key in settings}
