"""One call of a transformer, as far as forecasts depend on its arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

_TIMES = ("timestep", "timesteps", "t")
_CONDITIONS = ("encoder_hidden_states", "pooled_projections", "cap_feats", "prompt_embeds")


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """Arguments of one call of a transformer.

    Attributes:
        context: name that the pipeline gave the call through `cache_context`; None if it gave none.
        step: index of the step, if the pipeline told it in the same way.
        total: number of steps, likewise.
        form: whatever must not change during a generation: shapes, dtypes, devices.
        condition: tensors of the prompt.
        timestep: the timestep, one number or several; None if the transformer takes none.
        size: numbers of the sample for one image or video.
    """

    context: str | None
    step: int | None
    total: int | None
    form: tuple[Any, ...]
    condition: tuple[torch.Tensor, ...]
    timestep: torch.Tensor | None
    size: int = 0

    @classmethod
    def of(cls, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> Call:
        """Read the arguments of a call of `module`; `context` is diffusers' `CacheContext` or None.

        Raises:
            TypeError: `module` does not take these arguments.
        """
        signature = _signature(type(module).forward)
        given = signature.bind_partial(module, *args, **kwargs).arguments
        names = list(signature.parameters)
        condition = _tensors([value for name, value in given.items() if name.startswith(_CONDITIONS)])
        sample = _tensors([given.get(names[1])])
        timestep = next((given[name] for name in _TIMES if given.get(name) is not None), None)
        return cls(
            None if context is None else context.name,
            None if context is None else context.step_index,
            None if context is None else context.num_inference_steps,
            (given.get("return_dict"), *(_form(one) for one in (*sample, *condition))),
            condition,
            timestep if timestep is None else torch.as_tensor(timestep),
            sum(one.numel() // max(one.shape[0], 1) for one in sample),
        )

    def has_condition_of(self, other: Call) -> bool:
        """Whether the prompt's tensors are the very same."""
        return len(self.condition) == len(other.condition) and all(
            one is another for one, another in zip(self.condition, other.condition, strict=True)
        )

    def equals_condition_of(self, other: Call) -> bool:
        """Whether the prompt's tensors, of the same shapes, have the same content; waits for the device."""
        return all(
            one is another or torch.equal(one, another)
            for one, another in zip(self.condition, other.condition, strict=True)
        )

    def time(self) -> float:
        """Return the timestep, the largest where tokens have their own; waits for the device."""
        return 0.0 if self.timestep is None else float(self.timestep.max())


@lru_cache(maxsize=64)
def _signature(forward: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(forward)


def _tensors(values: Any) -> tuple[torch.Tensor, ...]:
    """Collect the tensors in nested lists."""
    if isinstance(values, torch.Tensor):
        return (values,)
    if isinstance(values, list | tuple):
        return tuple(tensor for value in values for tensor in _tensors(value))
    return ()


def _form(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.dtype, tensor.device
