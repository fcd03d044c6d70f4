"""Parts of presets: schedules and predictors, which YAML names by `kind`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from functools import lru_cache, reduce
from operator import or_
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, TypeAdapter

from runtime.files.extensions import Registry
from runtime.files.problems import nearest, shown
from runtime.request.bounds import NUMBER
from spectrum import (
    NOWHERE,
    Blend,
    ChebyshevRidge,
    ErrorSchedule,
    FixedSchedule,
    LinearExtrapolation,
    Predictor,
    Schedule,
    paper_schedule,
)


class Part(BaseModel):
    """One choice of a preset, with its settings; unknown settings are refused.

    Attributes:
        kind: name of the choice: a `Literal` of one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: str


class SchedulePart(Part):
    """Choice of a schedule: which steps are computed."""

    @abstractmethod
    def build(self, steps: int) -> Schedule:
        """Make the schedule of one generation with `steps` sampler steps.

        Raises:
            ValueError: the settings do not fit that many steps.
        """

    def build_anew(self, steps: int, fresh: Mapping[int, int]) -> Schedule:
        """Make the schedule of a generation whose history is dropped on its way, as another expert begins.

        By default it is that of `build`, and its leading steps are computed beside those that it says.

        Args:
            fresh: step before which the history is dropped → leading steps, which are computed.

        Raises:
            ValueError: as `build`.
        """
        return self.build(steps)


class PredictorPart(Part):
    """Choice of a predictor: how the other steps are forecast."""

    @abstractmethod
    def build(self, steps: int) -> Predictor:
        """Make the predictor of one generation with `steps` sampler steps."""


class FullSchedulePart(SchedulePart):
    """Schedule that computes every step."""

    kind: Literal["full"]

    def build(self, steps: int) -> Schedule:
        return FixedSchedule.full(steps)


class PaperSchedulePart(SchedulePart):
    """Spectrum's schedule with a growing window; see `spectrum.schedule.paper_schedule`."""

    kind: Literal["paper"]
    warmup: Annotated[int, Field(ge=1, le=1000), NUMBER] = 5
    window: Annotated[float, Field(ge=1, le=1000, allow_inf_nan=False), NUMBER] = 2.0
    alpha: Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False), NUMBER] = 0.75

    def build(self, steps: int) -> Schedule:
        return self.build_anew(steps, NOWHERE)

    def build_anew(self, steps: int, fresh: Mapping[int, int]) -> Schedule:
        own = {"warmup": self.warmup, "window": self.window, "alpha": self.alpha}
        return paper_schedule(steps, **own, fresh=fresh)  # type: ignore[arg-type]


class ExplicitSchedulePart(SchedulePart):
    """Schedule given as a list of computed steps."""

    kind: Literal["explicit"]
    computed: Annotated[
        list[Annotated[int, Field(ge=0, lt=1000), NUMBER]], Field(min_length=1, max_length=1000)
    ]

    def build(self, steps: int) -> Schedule:
        return FixedSchedule.explicit(steps, self.computed)


class ErrorSchedulePart(SchedulePart):
    """Schedule that computes steps when forecasts get bad; see `spectrum.schedule.ErrorSchedule`."""

    kind: Literal["error"]
    tolerance: Annotated[float, Field(ge=1e-9, le=1e9, allow_inf_nan=False), NUMBER] = 0.1
    warmup: Annotated[int, Field(ge=2, le=1000), NUMBER] = 5
    longest: Annotated[int, Field(ge=1, le=1000), NUMBER] = 8
    budget: Annotated[int, Field(ge=2, le=1000), NUMBER] | None = None

    def build(self, steps: int) -> Schedule:
        return ErrorSchedule(steps, self.tolerance, self.warmup, self.longest, self.budget)


class PlannedSchedulePart(Part):
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


class FittedSchedulePart(Part):
    """Fitted solver: the preset's calibration says which steps are computed, and moves the latents itself.

    Attributes:
        nfe: number of computed steps, for which the calibration has a solver.
        guard, most: as for a planned schedule; an added step hands over to the sampler and its forecasts.
    """

    kind: Literal["fitted"]
    nfe: Annotated[int, Field(ge=1, le=1000), NUMBER]
    guard: Annotated[float, Field(ge=1e-9, le=1e9, allow_inf_nan=False), NUMBER] | None = None
    most: Annotated[int, Field(ge=0, le=1000), NUMBER] = 4


class UniversalSchedulePart(Part):
    """Universal plan: the best steps for a budget, as other models' calibrations have it.

    Attributes:
        nfe: number of computed steps; None for as many as the paper's schedule computes.
    """

    kind: Literal["universal"]
    nfe: Annotated[int, Field(ge=1, le=1000), NUMBER] | None = None

    def budget(self, steps: int) -> int:
        """Number of computed steps, of `steps`."""
        return paper_schedule(steps).nfe if self.nfe is None else min(self.nfe, steps)


class ChebyshevPart(PredictorPart):
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


class LinearPart(PredictorPart):
    """Linear extrapolation from the last two computed values."""

    kind: Literal["linear"]

    def build(self, steps: int) -> Predictor:
        return LinearExtrapolation()


class CalibratedPart(Part):
    """Calibrated extrapolation from two remembered values; see `spectrum.calibrated`."""

    kind: Literal["calibrated"]


class UniversalPart(Part):
    """Extrapolation from two remembered values, as other models' calibrations have it."""

    kind: Literal["universal"]


SCHEDULES: Registry[type[SchedulePart]] = Registry(
    "schedule",
    {
        "full": FullSchedulePart,
        "paper": PaperSchedulePart,
        "explicit": ExplicitSchedulePart,
        "error": ErrorSchedulePart,
    },
)
PREDICTORS: Registry[type[PredictorPart]] = Registry(
    "predictor", {"chebyshev": ChebyshevPart, "linear": LinearPart}
)
_MEASURED = ("planned", "fitted", "calibrated", "universal")  # names of parts that follow a calibration
_S = TypeVar("_S", bound=type[SchedulePart])
_P = TypeVar("_P", bound=type[PredictorPart])


def add_schedule(part: _S) -> _S:
    """Add a schedule to those that presets may name; used as a decorator.

    Raises:
        ValueError: the part has no name, or its name is taken.
    """
    SCHEDULES.add(_name_of(part), part)
    return part


def add_predictor(part: _P) -> _P:
    """Add a predictor to those that presets may name; used as a decorator.

    Raises:
        ValueError: the part has no name, or its name is taken.
    """
    PREDICTORS.add(_name_of(part), part)
    return part


def _name_of(part: type[Part]) -> str:
    names = get_args(part.model_fields["kind"].annotation)
    if len(names) != 1 or names[0] in _MEASURED:
        raise ValueError(f'{part.__name__}.kind must be Literal["NAME"], with a name that is not taken')
    return str(names[0])


def chosen_from(known: Registry[Any], **others: type[Part]) -> PlainValidator:
    """Make a validator that accepts any known part, or one of `others`, by its `kind`."""

    def validate(given: Any) -> Any:
        if isinstance(given, dict):
            kind = given.get("kind")
            if not isinstance(kind, str) or (kind not in others and known.find(kind) is None):
                said = f"{shown(kind)} given" if "kind" in given else "missing"
                names = [*known, *others]
                raise ValueError(f"kind: {said}; it must be one of {', '.join(names)}{nearest(kind, names)}")
        parts = (*known.values(), *others.values())
        return given if isinstance(given, parts) else _chooser(parts).validate_python(given)

    own = _choice((*known.values(), *others.values()))  # of packages none is known yet
    return PlainValidator(validate, json_schema_input_type=own)


@lru_cache(maxsize=16)
def _chooser(parts: tuple[type[Part], ...]) -> TypeAdapter[Part]:
    """Make what accepts one of several parts, distinguished by their `kind`."""
    return TypeAdapter(_choice(parts))


def _choice(parts: tuple[type[Part], ...]) -> Any:
    """Type of one of several parts."""
    choice: Any = reduce(or_, parts)
    return Annotated[choice, Field(discriminator="kind")]
