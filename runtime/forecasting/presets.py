"""Forecasting presets: YAML → the schedule, predictor and stream that a generation runs with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    SerializeAsAny,
    model_validator,
)

from runtime.errors import BadRequestError
from runtime.files.extensions import source_of
from runtime.files.text import beside, user_path
from runtime.forecasting import universal
from runtime.forecasting.calibration import Calibration, is_file_name, load_calibration
from runtime.forecasting.expectation import Expectation
from runtime.forecasting.parts import (
    PREDICTORS,
    SCHEDULES,
    CalibratedPart,
    ChebyshevPart,
    FittedSchedulePart,
    FullSchedulePart,
    PlannedSchedulePart,
    PredictorPart,
    SchedulePart,
    UniversalPart,
    UniversalSchedulePart,
    chosen_from,
)
from runtime.forecasting.streams import STREAM_TRAITS, known_stream
from runtime.forecasting.validity import Conditions
from runtime.request.bounds import NUMBER
from runtime.request.config import AUTO, is_path, open_yaml
from runtime.request.video_request import FileName, VideoRequest
from spectrum import (
    NOWHERE,
    AdaptiveSchedule,
    FixedSchedule,
    GuardedSchedule,
    PlannedSteps,
    Planner,
    Predictor,
    Schedule,
    StepKind,
    surprise,
)
from spectrum.solver import FittedSolver
from spectrum.universal import universal_plan, universal_predictor


class Switch(BaseModel):
    """What becomes of a history when another expert takes over; what is missing is the model's own choice.

    Attributes:
        history: `fresh` drops it, `carried` keeps it. Features are always dropped.
        warmup: with a fresh history, number of the expert's first steps that are computed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    history: Literal["fresh", "carried"] | None = None
    warmup: Annotated[int, Field(ge=1, le=1000), NUMBER] | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.history == "carried" and self.warmup is not None:
            raise ValueError("warmup: not with history: carried, which needs no warm-up")
        return self


_Schedule = SchedulePart | PlannedSchedulePart | FittedSchedulePart | UniversalSchedulePart


class Preset(BaseModel):
    """Forecasting preset: which steps are computed, and how the others are forecast.

    Attributes:
        stream: forecast quantity: each branch's `feature` (the output of the last transformer block) or
            `velocity` (the model's output), the `guided` velocity of both branches, or
            an added stream.
        schedule: rule that says which steps are computed.
        uncond: schedule of the unconditional branch, if it has its own.
        predictor: rule by which the other steps are forecast.
        calibration: name or path (relative to the preset) of the calibration that planned schedules, fitted
            solvers and calibrated predictors need.
        switch: what becomes of the history when another expert takes over. A calibration knows the steps of
            all experts, so with one the history of outputs is carried by default, and so it is with universal
            weights.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    stream: Annotated[str, AfterValidator(known_stream)] = "feature"
    schedule: Annotated[
        SerializeAsAny[_Schedule],
        chosen_from(
            SCHEDULES,
            planned=PlannedSchedulePart,
            fitted=FittedSchedulePart,
            universal=UniversalSchedulePart,
        ),
    ]
    uncond: Annotated[SerializeAsAny[SchedulePart], chosen_from(SCHEDULES)] | None = None
    predictor: Annotated[
        SerializeAsAny[PredictorPart | CalibratedPart | UniversalPart],
        chosen_from(PREDICTORS, calibrated=CalibratedPart, universal=UniversalPart),
    ] = ChebyshevPart(kind="chebyshev")
    calibration: FileName | None = None
    switch: Annotated[Switch | None, Field(exclude_if=lambda switch: switch is None)] = None
    _levels: universal.Levels | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        planned = isinstance(self.schedule, PlannedSchedulePart | FittedSchedulePart)
        calibrated = isinstance(self.predictor, CalibratedPart)
        if (planned or calibrated) != (self.calibration is not None):
            needs = "planned and fitted schedules and calibrated predictors"
            raise ValueError(f"{needs}, and only they, need a calibration")
        if planned and not calibrated:
            raise ValueError(f"a {self.schedule.kind} schedule needs the calibrated predictor")
        if isinstance(self.schedule, FittedSchedulePart) and self.stream != "guided":
            raise ValueError(f"stream: {self.stream} given; a fitted solver needs guided")
        if isinstance(self.schedule, UniversalSchedulePart) and not self.is_universal:
            raise ValueError("a universal schedule needs the universal predictor")
        if self.is_universal and not STREAM_TRAITS[self.stream].outputs:
            raise ValueError(f"stream: {self.stream} given; the universal predictor needs guided or velocity")
        joint = STREAM_TRAITS[self.stream].joint
        if self.uncond is not None and (planned or joint or isinstance(self.schedule, UniversalSchedulePart)):
            which = f"a {self.stream} stream" if joint else f"a {self.schedule.kind} schedule"
            raise ValueError(f"uncond: {which} covers both branches together")
        if self.crossing.history == "carried" and not STREAM_TRAITS[self.stream].outputs:
            raise ValueError(
                f"switch: a {self.stream} of one expert cannot forecast another's: use history: fresh"
            )
        return self

    @property
    def crossing(self) -> Switch:
        """What becomes of a history when another expert takes over, as far as the preset says."""
        measured = isinstance(self.predictor, CalibratedPart | UniversalPart)
        carried = measured and STREAM_TRAITS[self.stream].outputs
        return self.switch or Switch(history="carried" if carried else None)

    @property
    def is_universal(self) -> bool:
        """True if weights are those for models without a calibration."""
        return isinstance(self.predictor, UniversalPart)

    def at(self, levels: Sequence[float]) -> Preset:
        """The preset for a sampler with these noise levels, of which only universal presets take note."""
        if not self.is_universal:
            return self
        placed = self.model_copy()
        placed._levels = tuple(levels)
        return placed

    @property
    def forecasts(self) -> bool:
        """True if any step can be forecast."""
        return any(not isinstance(s, FullSchedulePart) for s in (self.schedule, self.uncond or self.schedule))

    @property
    def calibration_file(self) -> Path | None:
        """File of the preset's calibration; None for a shipped one, and without one."""
        named = self.calibration
        return None if named is None or not is_file_name(named) else user_path(named)

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that affects results; a calibration and added code count by their content."""
        content = self.model_dump(mode="json", exclude={"calibration"})
        added = {name: source for name, source in self._sources() if source is not None}
        return (
            content
            | {"calibration": None if self.calibrated is None else self.calibrated.digest}
            | ({"sources": added} if added else {})
            | ({"universal": universal.digest()} if self.is_universal else {})
        )

    def _sources(self) -> Iterator[tuple[str, str | None]]:
        """Yield the parts, with the identity of their code; None for Lockstep's own."""
        yield "stream", STREAM_TRAITS[self.stream].source
        parts = {"schedule": self.schedule, "uncond": self.uncond, "predictor": self.predictor}
        yield from ((name, source_of(type(part))) for name, part in parts.items() if part is not None)

    def check_fit(self, conditions: Conditions) -> None:
        """Refuse conditions for which the calibration is not valid.

        Raises:
            BadRequestError: conditions differ; the message says which.
        """
        if self.calibrated is not None:
            self.calibrated.conditions.check_fit(conditions, self.calibration or "")
            self.calibrated.gram(self.stream)

    def check_request(self, request: VideoRequest) -> None:
        """Check as `check_fit` and `schedules_of` do, as far as is possible before the model is loaded."""
        if self.calibrated is not None:
            self.calibrated.conditions.check_request(request, self.calibration or "")
            self.calibrated.gram(self.stream)
        self.schedules_of(request.steps, request.branches)

    def build_predictor(self, steps: int) -> Predictor:
        """Make the predictor of a stream with `steps` steps."""
        if isinstance(self.predictor, CalibratedPart):
            assert self.calibrated is not None
            return self.calibrated.predictor(self.stream)
        if isinstance(self.predictor, UniversalPart):
            return universal_predictor(universal.levels_of(steps, self._levels))
        return self.predictor.build(steps)

    @property
    def fitted(self) -> FittedSolver | None:
        """The fitted solver; None if the latents are moved by a sampler.

        Raises:
            BadRequestError: the calibration has no solver for this number of computed steps.
        """
        if not isinstance(self.schedule, FittedSchedulePart):
            return None
        assert self.calibrated is not None
        return self.calibrated.fit(self.schedule.nfe).fitted

    def schedules_of(
        self, steps: int, branches: Sequence[str], fresh: Mapping[int, int] = NOWHERE
    ) -> dict[str, Schedule]:
        """Make each branch's schedule for a sampler with `steps` steps; branches may share one.

        Args:
            fresh: step before which the history is dropped → steps that are computed from there on.

        Raises:
            BadRequestError: the preset's schedule does not fit that number of steps.
        """
        try:
            shared = self._build(self.schedule, steps, fresh)
            own = {"uncond": self._build(self.uncond, steps, fresh)} if self.uncond else {}
        except ValueError as error:
            raise BadRequestError(f"spectrum: the preset does not fit {steps} steps: {error}") from None
        return {branch: own.get(branch, shared) for branch in branches}

    def expected_kinds(self, steps: int, fresh: Mapping[int, int] = NOWHERE) -> list[StepKind]:
        """Expected kind of every step: computed if any branch is, or if it depends on measured errors.

        Args:
            fresh: step before which the history is dropped → steps that are computed from there on.
        """
        schedules = [
            self._build(part, steps, fresh) for part in (self.schedule, self.uncond or self.schedule)
        ]
        if any(isinstance(s, AdaptiveSchedule) and not isinstance(s, GuardedSchedule) for s in schedules):
            return [StepKind.COMPUTE] * steps
        kinds = [min(schedule.kind(step) for schedule in schedules) for step in range(steps)]
        for start, count in fresh.items():
            kinds[start : start + count] = [StepKind.COMPUTE] * count
        return kinds

    def expectation(
        self,
        steps: int,
        computed: Sequence[int],
        errors: dict[int, float],
        schedules: Mapping[str, Schedule],
        dropped: list[int],
        fresh: Mapping[int, int] = NOWHERE,
    ) -> Expectation:
        """Expected quality of a generation whose computed steps and errors are known."""
        added = [s.added for s in schedules.values() if isinstance(s, GuardedSchedule)]
        known = Expectation(added=sorted(added[0]) if added else [], dropped=dropped)
        if self.is_universal:
            return replace(known, note="quality not predicted for this model")
        if self.calibrated is None or not isinstance(self.predictor, CalibratedPart):
            return known
        priced = _planner(self.calibrated, self.stream, tuple(fresh.items())).price(computed)
        expected = {step: error for step, error in enumerate(priced.errors) if error is not None}
        if isinstance(self.schedule, FittedSchedulePart):
            fit = self.calibrated.fit(self.schedule.nfe)
            if list(computed) == fit.nodes:
                return fit.expectation(errors, known)
            left = _first_departure(computed, fit.nodes)
            later = {step: error for step, error in expected.items() if step >= left}
            expected = later | {step: error for step, error in fit.of_nodes.items() if step < left}
            known, errors = replace(known, handed_over=left), {}  # errors of two kinds are not compared
        prediction = None
        if self.stream == "guided":
            known_surprise = surprise(errors, priced.expected) if errors else None
            prediction = self.calibrated.predict(priced.error, known_surprise)
        if prediction is None:
            return replace(known, errors=expected)
        return replace(known, psnr=prediction.psnr, deviation=prediction.deviation, errors=expected)

    def _build(
        self,
        part: _Schedule,
        steps: int,
        fresh: Mapping[int, int],
    ) -> Schedule:
        if isinstance(part, SchedulePart):
            return part.build_anew(steps, fresh)
        if isinstance(part, UniversalSchedulePart):
            levels = universal.levels_of(steps, self._levels)
            plan = universal_plan(levels, part.budget(steps), tuple(fresh.items()))
            return FixedSchedule(steps, plan.computed)
        assert self.calibrated is not None
        if isinstance(part, FittedSchedulePart):
            plan = self.calibrated.fit(part.nfe).fitted.steps(self.calibrated.conditions.steps)
        else:
            plan = _plan(self.calibrated, self.stream, tuple(fresh.items()), part.nfe)
        if plan.steps != steps:
            raise ValueError(f"it is planned for {plan.steps} steps")
        if part.guard is None:
            return FixedSchedule(plan.steps, plan.computed)
        return GuardedSchedule(plan, part.guard, part.most)

    @cached_property
    def calibrated(self) -> Calibration | None:
        """Calibration of the preset, as its file was when it was first needed; None if it needs none."""
        return None if self.calibration is None else load_calibration(self.calibration)


def _first_departure(computed: Sequence[int], nodes: Sequence[int]) -> int:
    """First step that is computed though it is no node, or the other way round."""
    return min({*computed} ^ {*nodes})


@lru_cache(maxsize=64)
def _plan(
    calibration: Calibration, stream: str, fresh: tuple[tuple[int, int], ...], nfe: int
) -> PlannedSteps:
    return _planner(calibration, stream, fresh).plan(nfe)


@lru_cache(maxsize=16)
def _planner(calibration: Calibration, stream: str, fresh: tuple[tuple[int, int], ...]) -> Planner:
    """Cache planners: their cost tables take a moment, and each generation needs them several times."""
    return calibration.planner(stream, dict(fresh))


def load_preset(name: str) -> Preset:
    """Load the preset called `name` in `configs/spectrum/`, or the one in the YAML file `name`.

    Raises:
        BadRequestError: there is none, or it is not valid; the message lists the presets that exist.
    """
    if name == AUTO:
        raise BadRequestError(
            f"spectrum: {name!r} given; it chooses a preset for a request, and there is none: name a preset"
        )
    file = open_yaml(name, folder="spectrum", field="spectrum")
    preset = file.parse(Preset)
    named = preset.calibration
    if named is None or not is_path(name) or not is_file_name(named):
        return preset
    return preset.model_copy(update={"calibration": beside(named, file.folder)})
