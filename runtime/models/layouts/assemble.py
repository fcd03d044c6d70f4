"""Components made of weights in another layout, as `from_pretrained` would load them once converted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn

from runtime.models.layouts.sources import Sources
from runtime.models.layouts.weights import made


def assemble(kind: Any, folder: Path, dtype: torch.dtype) -> tuple[Any, dict[str, list[str]]]:
    """Make a component of weights in another layout; one tensor at a time is held twice.

    Args:
        kind: class of the component, in diffusers or transformers.
        folder: folder of its settings, and of the description of its weights.
        dtype: dtype in which they are stored; those that the class keeps in float32 are.

    Returns:
        The component, and the loading info that `from_pretrained` returns.

    Raises:
        OSError, ValueError: a file is damaged, or has changed.
    """
    sources = Sources.read(folder)
    with init_empty_weights(include_buffers=False):
        model = empty(kind, folder)
    own = dict(_own_names(model, sources))
    exempt = kept_wide(kind, dtype)
    for name, tensor in made(sources.weights, own):
        wanted = torch.float32 if exempt.intersection(name.split(".")) else dtype
        _put(model, own[name], tensor.to(wanted, copy=True))
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    unexpected = sorted(sources.weights.keys() - own.keys())
    return model.eval(), {"missing_keys": missing, "unexpected_keys": unexpected}


def empty(kind: Any, folder: Path) -> Any:
    """Make a component of a class in diffusers or transformers from its settings, with whatever weights."""
    if hasattr(kind, "load_config"):
        return kind.from_config(kind.load_config(folder))
    return kind(kind.config_class.from_pretrained(folder))


def kept_wide(kind: Any, dtype: torch.dtype) -> frozenset[str]:
    """Names of modules and parameters of a class that stay in float32 when it is loaded in a dtype.

    In transformers, most of them do so in float16 only.
    """
    if hasattr(kind, "load_config") or dtype == torch.float16:
        names = getattr(kind, "_keep_in_fp32_modules", None)
    else:
        names = getattr(kind, "_keep_in_fp32_modules_strict", None)
    return frozenset(names or ())


def _own_names(model: nn.Module, sources: Sources) -> Iterator[tuple[str, str]]:
    """Names of weights in files → in the model: transformers' hub files may have one part more in front."""
    known = model.state_dict().keys()
    for name in sources.weights:
        for candidate in (name, name.partition(".")[2]):
            if candidate in known:
                yield name, candidate
                break


def _put(model: nn.Module, name: str, value: torch.Tensor) -> None:
    owner_name, _, leaf = name.rpartition(".")
    model.get_submodule(owner_name)._parameters[leaf] = nn.Parameter(value, requires_grad=False)
