"""Switch Spectrum on and off for a pipeline, and report what it did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from typing import Any

import torch
from diffusers.hooks import HookRegistry
from diffusers.utils.torch_utils import unwrap_module
from torch import nn

from spectrum.diffusers.attach import attach, detach
from spectrum.diffusers.blocks import Block, blocks_of
from spectrum.diffusers.conditions import TRANSFORMERS, transformers_of
from spectrum.diffusers.generation import Reduce
from spectrum.diffusers.hooks import NAME, BlockHook, FeatureHook, TransformerHook, VelocityHook
from spectrum.diffusers.presets import Preset
from spectrum.diffusers.report import Report
from spectrum.diffusers.samplers import Samplers
from spectrum.diffusers.session import Session


def enable(
    target: Any,
    preset: Preset | str | PathLike[str] | Mapping[str, Any] = "paper",
    *,
    steps: int | None = None,
    stream: str | None = None,
    storage: torch.device | str | None = None,
    reduce: Reduce | None = None,
) -> None:
    """Forecast most steps of a pipeline instead of computing them.

    The pipeline is used as before. Enabling it again replaces the preset. A transformer that several
    pipelines share serves all that were enabled, in turn or interleaved; calls by others are computed.

    Args:
        target: a pipeline of diffusers, or a transformer that is called by a loop of its own.
        preset: `paper`, `paper-fast`, `universal`, `universal-10`, `universal-8` or `off`, what `plan`
            returns, a `Preset`, a YAML file like those of `lockstep --spectrum`, or its content.
        steps: number of steps; for a transformer alone, since a pipeline's scheduler tells it.
        stream: `feature` or `velocity` in place of the preset's. `feature`, the paper's, is the output of the
            last block; `velocity` is the output of the transformer, whichever it is, and takes less memory.
        storage: device on which histories are kept, such as `cpu`; by default where they are computed.
        reduce: adds up a tensor over the ranks that compute one image or video, in place, such as
            `torch.distributed.all_reduce`. Needed by schedules that depend on errors, if each rank has a part
            of the tokens.

    Raises:
        ValueError: an argument is not valid, or the blocks of a transformer are not known, or another cache
            is enabled; nothing was changed then.

    Example:
        >>> pipe = FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev")  # doctest: +SKIP
        >>> enable(pipe)  # doctest: +SKIP
        >>> image = pipe("a red fox", num_inference_steps=50).images[0]  # doctest: +SKIP
        >>> report(pipe)["transformer"].nfe  # doctest: +SKIP
        14
    """
    chosen = Preset.load(preset)
    if stream is not None:
        if chosen.conditions is not None and stream != chosen.stream:
            raise ValueError(f"stream: {stream!r} given; {chosen.name} is planned for {chosen.stream}")
        chosen = replace(chosen, stream=stream)
    modules, alone = _transformers_of(target), isinstance(target, nn.Module)
    if alone and (not isinstance(steps, int) or steps < 1):
        raise ValueError(f"steps: {steps} given; a transformer alone needs the number of steps, at least 1")
    if not alone and steps is not None:
        raise ValueError(
            f"steps: {steps} given; the scheduler of {type(target).__name__} determines their number"
        )
    for name, module in modules.items():
        if getattr(module, "is_cache_enabled", False):
            raise ValueError(f"{name}: another cache is enabled; call {name}.disable_cache() first")
    if chosen.conditions is not None:
        if alone:
            raise ValueError(f"{chosen.name}: a plan is for a pipeline, not for a transformer alone")
        chosen.conditions.check_pipeline(target)
    forecast_features = chosen.forecasts and chosen.stream == "feature"
    blocks = {name: blocks_of(module) if forecast_features else [] for name, module in modules.items()}
    device = None if storage is None else torch.device(storage)
    first, *others = (Session(chosen, steps, device, reduce) for _ in modules)
    sessions = [first, *([first] * len(others) if chosen.carried else others)]
    for (name, module), session in zip(modules.items(), sessions, strict=True):
        session.siblings = [other for other in sessions if other is not session]
        if not alone:
            session.samplers = _samplers_of(module)
            session.samplers.add(target)
        _attach(module, session, blocks[name])


def disable(target: Any) -> None:
    """Take Spectrum off a pipeline's transformers, or off a transformer; nothing of it is left behind.

    Raises:
        ValueError: `target` is no pipeline and no transformer.
    """
    for module in _transformers_of(target).values():
        detach(module, NAME)
        HookRegistry.check_if_exists_or_initialize(module).invalidate_child_registries_cache()


def report(target: Any) -> dict[str, Report]:
    """Report the latest generation: transformer's name in the pipeline → its report.

    Transformers that go on with each other's history, as with a plan, have the same report.

    Raises:
        ValueError: Spectrum is not enabled.
    """
    reports = {name: _hook_of(module) for name, module in _transformers_of(target).items()}
    found = {name: hook.session.report() for name, hook in reports.items() if hook is not None}
    if not found:
        raise ValueError(f"{type(target).__name__}: Spectrum is not enabled; call enable(...) first")
    return found


def is_enabled(target: Any) -> bool:
    """Whether Spectrum is enabled on one of a pipeline's transformers, or on a transformer."""
    return any(_hook_of(module) is not None for module in _transformers_of(target).values())


def _attach(module: nn.Module, session: Session, blocks: list[Block]) -> None:
    disable(module)
    hook = FeatureHook(session) if blocks else VelocityHook(session)
    for block in blocks:
        attach(block.module, BlockHook(hook, block), NAME)
    attach(module, hook, NAME)
    HookRegistry.check_if_exists_or_initialize(module).invalidate_child_registries_cache()


def _transformers_of(target: Any) -> dict[str, nn.Module]:
    """Name → transformer.

    Raises:
        ValueError: there is none.
    """
    found = {"transformer": target} if isinstance(target, nn.Module) else transformers_of(target)
    if not found:
        raise ValueError(f"{type(target).__name__} has none of {', '.join(TRANSFORMERS)}")
    return {name: unwrap_module(module) for name, module in found.items()}


def _hook_of(module: nn.Module) -> TransformerHook | None:
    return HookRegistry.check_if_exists_or_initialize(module).get_hook(NAME)  # type: ignore[no-any-return]


def _samplers_of(module: nn.Module) -> Samplers:
    """Pipelines that the transformer was enabled for before."""
    hook = _hook_of(module)
    return Samplers() if hook is None else hook.session.samplers
