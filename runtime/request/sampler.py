"""Choice of a sampler, and for models of few steps the list of its steps."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from runtime.request.bounds import NUMBER

_Sigma = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False), NUMBER]
_Timestep = Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False), NUMBER]
_LISTS = {"sigmas": ("unipc", "euler"), "timesteps": ("euler",)}  # list → samplers that take it


class SamplerConfig(BaseModel):
    """The sampler, and for models of few steps a list of its steps.

    Attributes:
        kind: the sampler; `model` is the one in the model's folder.
        shift: shift of the noise levels; None for the model's own.
        sigmas: noise level at the beginning of each step, 1 … 0, before the shift.
        timesteps: timestep of each step, 1000 … 0, as the transformer sees it, so there is no shift.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["model", "unipc", "euler", "dpm++"] = "model"
    shift: Annotated[float, Field(ge=0.001, le=1000, allow_inf_nan=False), NUMBER] | None = None
    sigmas: Annotated[tuple[_Sigma, ...], Field(min_length=1, max_length=1000)] | None = None
    timesteps: Annotated[tuple[_Timestep, ...], Field(min_length=1, max_length=1000)] | None = None

    @model_validator(mode="after")
    def _one_list_that_the_sampler_takes(self) -> Self:
        lists = {name: values for name in _LISTS if (values := getattr(self, name)) is not None}
        if len(lists) > 1:
            raise ValueError("sigmas and timesteps are given; give only one of them")
        for name, values in lists.items():
            if self.kind not in _LISTS[name]:
                able = " or ".join(_LISTS[name])
                raise ValueError(f"kind: {self.kind!r} given; {name} need a sampler that takes them: {able}")
            if any(later >= value for value, later in pairwise(values)):
                raise ValueError(f"{name}: must be in descending order")
        if self.timesteps is not None and self.shift is not None:
            raise ValueError(
                f"shift: {self.shift:g} given; it has no effect on given timesteps: leave it out"
            )
        return self

    @property
    def steps(self) -> int | None:
        """Number of steps that are listed; None if none are."""
        listed = self.timesteps if self.sigmas is None else self.sigmas
        return None if listed is None else len(listed)

    def check_steps(self, steps: int) -> None:
        """Refuse a number of steps other than that of the list.

        Raises:
            ValueError: there are other steps.
        """
        if self.steps is not None and steps != self.steps:
            name = "timesteps" if self.sigmas is None else "sigmas"
            raise ValueError(
                f"steps: {steps} given; the config's scheduler lists the {name} of {self.steps} steps, for "
                "which the model is made"
            )
