"""Forecasting presets: YAML → the schedule, predictor and stream that a generation runs with."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from runtime.configs import load_yaml
from runtime.errors import BadRequestError
from spectrum import (
    Blend,
    ChebyshevRidge,
    FixedSchedule,
    LinearExtrapolation,
    Predictor,
    Schedule,
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
        predictor: how the others are forecast.
    """

    stream: Literal["feature"] = "feature"
    schedule: Annotated[
        FullSchedulePart | PaperSchedulePart | ExplicitSchedulePart, Field(discriminator="kind")
    ]
    predictor: Annotated[ChebyshevPart | LinearPart, Field(discriminator="kind")] = ChebyshevPart(
        kind="chebyshev"
    )

    @property
    def forecasts(self) -> bool:
        """Whether any step can be forecast."""
        return not isinstance(self.schedule, FullSchedulePart)

    def schedule_of(self, steps: int) -> Schedule:
        """The schedule of a sampler with `steps` steps.

        Raises:
            BadRequestError: the preset's schedule does not fit that many.
        """
        try:
            return self.schedule.build(steps)
        except ValueError as error:
            raise BadRequestError(f"spectrum: the preset does not fit {steps} steps: {error}") from None


def load_preset(name: str) -> Preset:
    """The preset called `name` in `configs/spectrum/`, or the one in the YAML file `name`.

    Raises:
        BadRequestError: there is none, or it is not valid; the message says what there is.
    """
    return load_yaml(Preset, name, folder="spectrum", field="spectrum")
