"""Attaching hooks of diffusers to modules, and taking them off again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers.hooks import HookRegistry
from torch import nn


def attach(module: nn.Module, hook: Any, name: str) -> None:
    """Put a hook on a module, outside of diffusers' others."""
    with _beneath_accelerate(module):
        HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, name)


def detach(module: nn.Module, name: str) -> None:
    """Take the hooks of that name off a module and those within it."""
    for part in list(module.modules()):
        registry = getattr(part, "_diffusers_hook", None)
        if registry is not None and name in registry.hooks:
            with _beneath_accelerate(part):
                registry.remove_hook(name, recurse=False)


@contextmanager
def _beneath_accelerate(module: nn.Module) -> Iterator[None]:
    """Take off the wrapper that accelerate's hooks have put around a module's `forward`, and put it back.

    A pipeline with `enable_model_cpu_offload` makes the wrapper anew after every generation, around what was
    wrapped before. Whatever lay around the wrapper would be lost then.
    """
    own = vars(module)
    if "_old_forward" not in own:
        yield
        return
    wrapper, own["forward"] = own["forward"], own["_old_forward"]
    try:
        yield
    finally:
        own["_old_forward"], own["forward"] = own["forward"], wrapper
