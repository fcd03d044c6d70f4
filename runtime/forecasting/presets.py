"""Forecasting presets: YAML → the schedule, predictor and stream that a generation runs with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from runtime.errors import BadRequestError
from runtime.files.text import beside
from runtime.forecasting.calibration import Calibration, StreamName, is_file_name, load_calibration
from runtime.forecasting.expectation import Expectation
from runtime.forecasting.validity import Conditions
from runtime.request.bounds import NUMBER
from runtime.request.config import is_path, open_yaml
from runtime.request.video_request import FileName, VideoRequest
from spectrum import (
    Blend,
    ChebyshevRidge,
    ErrorSchedule,
    FixedSchedule,
    GuardedSchedule,
    LinearExtrapolation,
    PlannedSteps,
    Planner,
    Predictor,
    Schedule,
    StepKind,
    paper_schedule,
    surprise,
)


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FullSchedulePart(_Part):
    """Schedule that computes every step."""

    kind: Literal["full"]

    def build(self, steps: int) -> Schedule:
        return FixedSchedule.full(steps)


class PaperSchedulePart(_Part):
    """Spectrum's schedule with a growing window; see `spectrum.schedule.paper_schedule`."""

    kind: Literal["paper"]
    warmup: Annotated[int, Field(ge=1, le=1000), NUMBER] = 5
    window: Annotated[float, Field(ge=1, le=1000, allow_inf_nan=False), NUMBER] = 2.0
    alpha: Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False), NUMBER] = 0.75

    def build(self, steps: int) -> Schedule:
        return paper_schedule(steps, warmup=self.warmup, window=self.window, alpha=self.alpha)


class ExplicitSchedulePart(_Part):
    """Schedule given as a list of computed steps."""

    kind: Literal["explicit"]
    computed: Annotated[
        list[Annotated[int, Field(ge=0, lt=1000), NUMBER]], Field(min_length=1, max_length=1000)
    ]

    def build(self, steps: int) -> Schedule:
        return FixedSchedule.explicit(steps, self.computed)


class ErrorSchedulePart(_Part):
    """Schedule that computes steps when forecasts get bad; see `spectrum.schedule.ErrorSchedule`."""

    kind: Literal["error"]
    tolerance: Annotated[float, Field(ge=1e-9, le=1e9, allow_inf_nan=False), NUMBER] = 0.1
    warmup: Annotated[int, Field(ge=2, le=1000), NUMBER] = 5
    longest: Annotated[int, Field(ge=1, le=1000), NUMBER] = 8
    budget: Annotated[int, Field(ge=2, le=1000), NUMBER] | None = None

    def build(self, steps: int) -> Schedule:
        return ErrorSchedule(steps, self.tolerance, self.warmup, self.longest, self.budget)


class PlannedSchedulePart(_Part):
    """Planned schedule: the best steps for a budget, from the preset's calibration.

    Attributes:
        nfe: number of computed steps.
        guard: ratio of measured to expected forecast error above which a step is added; None for never.
        most: largest number of steps that the guard may add.
    """

    kind: Literal["planned"]
    nfe: Annotated[int, Field(ge=1, le=1000), NUMBER]
    guard: Annotated[float, Field(ge=1e-9, le=1e9, allow_inf_nan=False), NUMBER] | None = 3.0
    most: Annotated[int, Field(ge=0, le=1000), NUMBER] = 4


_FreeSchedulePart = FullSchedulePart | PaperSchedulePart | ExplicitSchedulePart | ErrorSchedulePart
_SchedulePart = Annotated[_FreeSchedulePart | PlannedSchedulePart, Field(discriminator="kind")]


class ChebyshevPart(_Part):
    """Ridge regression on Chebyshev polynomials, blended with linear extrapolation.

    Attributes:
        degree, ridge: highest degree, and regularisation.
        blend: share of the regression; 1 for no linear extrapolation.
        horizon: number of steps that spans the basis; by default the request's number of steps.
    """

    kind: Literal["chebyshev"]
    degree: Annotated[int, Field(ge=0, le=64), NUMBER] = 4
    ridge: Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False), NUMBER] = 0.1
    blend: Annotated[float, Field(ge=0, le=1), NUMBER] = 1.0
    horizon: Annotated[float, Field(ge=1, le=1e6, allow_inf_nan=False), NUMBER] | None = None

    def build(self, steps: int) -> Predictor:
        spectral = ChebyshevRidge(horizon=self.horizon or steps, degree=self.degree, ridge=self.ridge)
        return spectral if self.blend == 1.0 else Blend(spectral, LinearExtrapolation(), self.blend)


class LinearPart(_Part):
    """Linear extrapolation from the last two computed values."""

    kind: Literal["linear"]

    def build(self, steps: int) -> Predictor:
        return LinearExtrapolation()


class CalibratedPart(_Part):
    """Calibrated extrapolation from two remembered values; see `spectrum.calibrated`."""

    kind: Literal["calibrated"]


_FreePredictorPart = ChebyshevPart | LinearPart


class Preset(_Part):
    """Forecasting preset: which steps are computed, and how the others are forecast.

    Attributes:
        stream: forecast quantity: each branch's `feature` (the output of the last transformer block) or
            `velocity` (the model's output), or the `guided` velocity of both branches.
        schedule: rule that says which steps are computed.
        uncond: schedule of the unconditional branch, if it has its own.
        predictor: rule by which the other steps are forecast.
        calibration: name or path (relative to the preset) of the calibration that planned schedules and
            calibrated predictors need.
    """

    stream: StreamName = "feature"
    schedule: _SchedulePart
    uncond: Annotated[_FreeSchedulePart, Field(discriminator="kind")] | None = None
    predictor: Annotated[_FreePredictorPart | CalibratedPart, Field(discriminator="kind")] = ChebyshevPart(
        kind="chebyshev"
    )
    calibration: FileName | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        planned = isinstance(self.schedule, PlannedSchedulePart)
        calibrated = isinstance(self.predictor, CalibratedPart)
        if (planned or calibrated) != (self.calibration is not None):
            raise ValueError("planned schedules and calibrated predictors, and only they, need a calibration")
        if planned and not calibrated:
            raise ValueError("a planned schedule needs the calibrated predictor")
        if self.uncond is not None and (planned or self.stream == "guided"):
            raise ValueError("uncond: a guided stream or a planned schedule covers both branches together")
        return self

    @property
    def forecasts(self) -> bool:
        """True if any step can be forecast."""
        return any(not isinstance(s, FullSchedulePart) for s in (self.schedule, self.uncond or self.schedule))

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that affects results; a calibration counts by its content, not its name."""
        content = self.model_dump(mode="json", exclude={"calibration"})
        return content | {"calibration": None if self.calibrated is None else self.calibrated.digest}

    def check_fit(self, conditions: Conditions) -> None:
        """Refuse conditions for which the calibration is not valid.

        Raises:
            BadRequestError: conditions differ; the message says which.
        """
        if self.calibrated is not None:
            self.calibrated.conditions.check_fit(conditions, self.calibration or "")

    def check_request(self, request: VideoRequest) -> None:
        """Check as `check_fit` and `schedules_of` do, as far as is possible before the model is loaded."""
        if self.calibrated is not None:
            self.calibrated.conditions.check_request(request, self.calibration or "")
        self.schedules_of(request.steps, request.branches)

    def build_predictor(self, steps: int) -> Predictor:
        """Make the predictor of a stream with `steps` steps."""
        if isinstance(self.predictor, CalibratedPart):
            assert self.calibrated is not None
            return self.calibrated.predictor(self.stream)
        return self.predictor.build(steps)

    def schedules_of(self, steps: int, branches: Sequence[str]) -> dict[str, Schedule]:
        """Make each branch's schedule for a sampler with `steps` steps; branches may share one.

        Raises:
            BadRequestError: the preset's schedule does not fit that number of steps.
        """
        try:
            shared = self._build(self.schedule, steps)
            own = {"uncond": self._build(self.uncond, steps)} if self.uncond else {}
        except ValueError as error:
            raise BadRequestError(f"spectrum: the preset does not fit {steps} steps: {error}") from None
        return {branch: own.get(branch, shared) for branch in branches}

    def expected_kinds(self, steps: int) -> list[StepKind]:
        """Expected kind of every step: computed if any branch is, or if it depends on measured errors."""
        schedules = [self._build(part, steps) for part in (self.schedule, self.uncond or self.schedule)]
        if any(isinstance(schedule, ErrorSchedule) for schedule in schedules):
            return [StepKind.COMPUTE] * steps
        kinds = [{schedule.kind(step) for schedule in schedules} for step in range(steps)]
        return [min(of_step) for of_step in kinds]  # "compute" < "forecast"

    def expectation(
        self,
        steps: int,
        computed: Sequence[int],
        errors: dict[int, float],
        schedules: Mapping[str, Schedule],
        dropped: list[int],
    ) -> Expectation:
        """Expected quality of a generation whose computed steps and errors are known."""
        added = [s.added for s in schedules.values() if isinstance(s, GuardedSchedule)]
        known = Expectation(added=sorted(added[0]) if added else [], dropped=dropped)
        if self.calibrated is None or not isinstance(self.predictor, CalibratedPart):
            return known
        priced = _planner(self.calibrated, self.stream).price(computed)
        expected = {step: error for step, error in enumerate(priced.errors) if error is not None}
        prediction = None
        if self.stream == "guided":
            prediction = self.calibrated.predict(priced.error, surprise(errors, priced.expected))
        if prediction is None:
            return replace(known, errors=expected)
        return replace(known, psnr=prediction.psnr, deviation=prediction.deviation, errors=expected)

    def _build(self, part: _FreeSchedulePart | PlannedSchedulePart, steps: int) -> Schedule:
        if not isinstance(part, PlannedSchedulePart):
            return part.build(steps)
        assert self.calibrated is not None
        plan = _plan(self.calibrated, self.stream, part.nfe)
        if plan.steps != steps:
            raise ValueError(f"it is planned for {plan.steps} steps")
        if part.guard is None:
            return FixedSchedule(plan.steps, plan.computed)
        return GuardedSchedule(plan, part.guard, part.most)

    @property
    def calibrated(self) -> Calibration | None:
        """Calibration of the preset; None if it needs none."""
        return None if self.calibration is None else load_calibration(self.calibration)


@lru_cache(maxsize=64)
def _plan(calibration: Calibration, stream: StreamName, nfe: int) -> PlannedSteps:
    return _planner(calibration, stream).plan(nfe)


@lru_cache(maxsize=16)
def _planner(calibration: Calibration, stream: StreamName) -> Planner:
    """Cache planners: their cost tables take a moment, and each generation needs them several times."""
    return calibration.planner(stream)


def load_preset(name: str) -> Preset:
    """Load the preset called `name` in `configs/spectrum/`, or the one in the YAML file `name`.

    Raises:
        BadRequestError: there is none, or it is not valid; the message lists the presets that exist.
    """
    file = open_yaml(name, folder="spectrum", field="spectrum")
    preset = file.parse(Preset)
    named = preset.calibration
    if named is None or not is_path(name) or not is_file_name(named):
        return preset
    return preset.model_copy(update={"calibration": beside(named, file.folder)})
