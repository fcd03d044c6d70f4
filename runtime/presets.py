"""Forecasting presets: YAML → the schedule, predictor and stream that a generation runs with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from runtime.configs import load_yaml
from runtime.errors import BadRequestError
from spectrum import (
    AdaptiveSchedule,
    Blend,
    ChebyshevRidge,
    ErrorSchedule,
    FixedSchedule,
    LinearExtrapolation,
    Predictor,
    Schedule,
    StepKind,
    paper_schedule,
)


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FullSchedulePart(_Part):
    """Every step is computed."""

    kind: Literal["full"]

    def build(self, steps: int) -> Schedule:
        return FixedSchedule.full(steps)


class PaperSchedulePart(_Part):
    """Spectrum's growing window: see `spectrum.schedule.paper_schedule`."""

    kind: Literal["paper"]
    warmup: Annotated[int, Field(ge=1)] = 5
    window: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 2.0
    alpha: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.75

    def build(self, steps: int) -> Schedule:
        return paper_schedule(steps, warmup=self.warmup, window=self.window, alpha=self.alpha)


class ExplicitSchedulePart(_Part):
    """A list of computed steps."""

    kind: Literal["explicit"]
    computed: Annotated[list[int], Field(min_length=1)]

    def build(self, steps: int) -> Schedule:
        return FixedSchedule.explicit(steps, self.computed)


class ErrorSchedulePart(_Part):
    """Steps are computed when forecasts get bad: see `spectrum.schedule.ErrorSchedule`."""

    kind: Literal["error"]
    tolerance: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1
    warmup: Annotated[int, Field(ge=2)] = 5
    longest: Annotated[int, Field(ge=1)] = 8

    def build(self, steps: int) -> Schedule:
        return ErrorSchedule(steps, self.tolerance, self.warmup, self.longest)


_SchedulePart = Annotated[
    FullSchedulePart | PaperSchedulePart | ExplicitSchedulePart | ErrorSchedulePart,
    Field(discriminator="kind"),
]


class ChebyshevPart(_Part):
    """Ridge regression on Chebyshev polynomials, blended with linear extrapolation (blend = 1: none of it).

    `horizon` is the number of steps that spans the basis; by default the request's own number of steps.
    """

    kind: Literal["chebyshev"]
    degree: Annotated[int, Field(ge=0, le=64)] = 4
    ridge: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.1
    blend: Annotated[float, Field(ge=0, le=1)] = 1.0
    horizon: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None

    def build(self, steps: int) -> Predictor:
        spectral = ChebyshevRidge(horizon=self.horizon or steps, degree=self.degree, ridge=self.ridge)
        return spectral if self.blend == 1.0 else Blend(spectral, LinearExtrapolation(), self.blend)


class LinearPart(_Part):
    """The straight line through the last two computed values."""

    kind: Literal["linear"]

    def build(self, steps: int) -> Predictor:
        return LinearExtrapolation()


class Preset(_Part):
    """How a generation skips evaluations.

    Attributes:
        stream: what is forecast; `feature` is the output of the last transformer block.
        schedule: which steps are computed.
        uncond: the same for the unconditional branch alone; by default it follows `schedule`.
        predictor: how the others are forecast.
    """

    stream: Literal["feature"] = "feature"
    schedule: _SchedulePart
    uncond: _SchedulePart | None = None
    predictor: Annotated[ChebyshevPart | LinearPart, Field(discriminator="kind")] = ChebyshevPart(
        kind="chebyshev"
    )

    @property
    def forecasts(self) -> bool:
        """Whether any step can be forecast."""
        return any(not isinstance(s, FullSchedulePart) for s in (self.schedule, self.uncond or self.schedule))

    def schedules_of(self, steps: int, branches: Sequence[str]) -> dict[str, Schedule]:
        """Each branch's schedule for a sampler with `steps` steps; branches that follow one share it.

        Raises:
            BadRequestError: the preset's schedule does not fit that many.
        """
        try:
            shared = self.schedule.build(steps)
            own = {"uncond": self.uncond.build(steps)} if self.uncond else {}
        except ValueError as error:
            raise BadRequestError(f"spectrum: the preset does not fit {steps} steps: {error}") from None
        return {branch: own.get(branch, shared) for branch in branches}

    def expected_kinds(self, steps: int) -> list[StepKind]:
        """The kind of every step: computed if a branch is, and where it depends on what happens."""
        schedules = {part.build(steps) for part in (self.schedule, self.uncond or self.schedule)}
        if any(isinstance(schedule, AdaptiveSchedule) for schedule in schedules):
            return [StepKind.COMPUTE] * steps
        kinds = [{schedule.kind(step) for schedule in schedules} for step in range(steps)]
        return [min(of_step) for of_step in kinds]  # "compute" < "forecast"


def load_preset(name: str) -> Preset:
    """The preset called `name` in `configs/spectrum/`, or the one in the YAML file `name`.

    Raises:
        BadRequestError: there is none, or it is not valid; the message says what there is.
    """
    return load_yaml(Preset, name, folder="spectrum", field="spectrum")
