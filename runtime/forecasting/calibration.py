"""Calibration: how a model's streams move under one sampler, and how errors at each step affect a video.

It is one small JSON file, from which the weights of forecasts, schedules for any budget, and the expected
quality are computed; `runtime.measure.calibrate` makes it.

Legend: n sampler steps.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from datetime import date
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, model_validator

from runtime.errors import BadRequestError, reason
from runtime.files.atomic import whole_file
from runtime.files.kinds import check_kind, check_kind_of_file
from runtime.files.problems import explain, nearest, shown
from runtime.files.text import is_file, read_text, user_path
from runtime.forecasting.fits import Fit
from runtime.forecasting.trials import FilePart, Finite, Positive, Trial
from runtime.forecasting.validity import Conditions
from runtime.request.bounds import NUMBER
from runtime.request.config import available, shipped
from spectrum import MAX_STEPS, NOWHERE, CalibratedPredictor, Gram, Planner, StepSeconds
from spectrum.calibration import SCHEMA, Measured, Prediction

StreamName = Literal["feature", "velocity", "guided"]


def _of_few_steps(conditions: Conditions) -> Conditions:
    """Refuse more steps than the planner supports; requests may have more."""
    if conditions.steps > MAX_STEPS:
        raise ValueError(f"{conditions.steps} steps; a calibration has at most {MAX_STEPS}")
    return conditions


class StepTimes(FilePart):
    """Seconds of one computed and one forecast step on the machine and ranks that made the calibration."""

    computed: Positive
    forecast: Positive
    ranks: Annotated[int, Field(ge=1, le=10**6), NUMBER]

    @property
    def steps(self) -> StepSeconds:
        """Seconds of a computed and of a forecast step, as `StepSeconds`."""
        return StepSeconds(self.computed, self.forecast)


class Calibration(FilePart):
    """Content of a calibration file, schema 2.

    Attributes:
        conditions: conditions under which it is valid.
        prompts, seeds: prompts and seeds of the videos that it was made from.
        noise_levels: σ of the sampler, `[n + 1]`.
        grams: stream → lower triangle of its mean Gram matrix, row by row; its trace is n.
        trajectory: lower triangle of the mean Gram matrix of the noise and the guided velocities of a video,
            divided by the squared norm of its result, `[n + 1, n + 1]`.
        sensitivity: size of an error in the final latent, relative to its size after each step, `[n]`.
        response: change of the guided velocity per change of the latent at each step, `[n]`.
        scale: root mean square of the guided velocity over that of the final latent.
        trials: videos made with planned schedules.
        fits: solvers, by ascending number of computed steps.
        seconds: duration of a step.
        made, versions: date, and versions of the software.
    """

    schema_: Annotated[Literal[2], Field(alias="schema")] = 2
    conditions: Annotated[Conditions, AfterValidator(_of_few_steps)]
    prompts: list[str]
    seeds: list[Annotated[int, NUMBER]]
    noise_levels: list[Finite]
    grams: Annotated[dict[StreamName, list[Finite]], Field(min_length=1)]
    trajectory: list[Finite]
    sensitivity: list[Positive]
    response: list[Positive]
    scale: Positive
    trials: list[Trial]
    fits: Annotated[list[Fit], Field(default_factory=list)]
    seconds: StepTimes
    made: date
    versions: dict[str, str]

    @model_validator(mode="after")
    def _whole(self) -> Calibration:
        n = self.conditions.steps
        self.measured.check(n)
        budgets = [fit.nfe for fit in self.fits]
        if budgets != sorted(set(budgets)) or any(fit.nodes[-1] >= n for fit in self.fits):
            raise ValueError(f"fits must be of ascending numbers of the {n} steps, got {budgets}")
        return self

    def __hash__(self) -> int:
        return hash(self.digest)

    @property
    def measured(self) -> Measured:
        """Its numbers, from which weights, plans and predictions follow."""
        return Measured(
            self.noise_levels,
            {str(name): values for name, values in self.grams.items()},
            self.trajectory,
            self.sensitivity,
            self.response,
            self.scale,
            self.trials,
        )

    @cached_property
    def digest(self) -> str:
        """SHA-256, hexadecimal, of everything that affects results."""
        content: dict[str, Any] = {
            "grams": self.grams,
            "sensitivity": self.sensitivity,
            "noise": self.noise_levels,
        }
        if self.fits:
            content["fits"] = [[fit.nodes, fit.rows, fit.forecasts, fit.expected] for fit in self.fits]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def gram(self, stream: str) -> Gram:
        """Mean Gram matrix of a stream, `[n, n]`.

        Raises:
            BadRequestError: the stream was not calibrated.
        """
        try:
            return self.measured.gram(stream)
        except ValueError as error:
            raise BadRequestError(f"spectrum: {error}") from None

    def fit(self, nfe: int) -> Fit:
        """Find the solver that computes `nfe` steps.

        Raises:
            BadRequestError: none was fitted for that number.
        """
        for one in self.fits:
            if one.nfe == nfe:
                return one
        budgets = ", ".join(str(one.nfe) for one in self.fits)
        has = f"solvers of {budgets} computed steps" if budgets else "no solver"
        remedy = f"`lockstep calibrate --budgets {nfe}` fits one"
        raise BadRequestError(f"spectrum: nfe: {nfe} given; this calibration has {has}. {remedy}")

    def predictor(self, stream: str) -> CalibratedPredictor:
        """Make the calibrated predictor of a stream."""
        return CalibratedPredictor(self.gram(stream))

    def planner(self, stream: str, fresh: Mapping[int, int] = NOWHERE) -> Planner:
        """Make the planner of a stream, whose expected errors are relative to the final latent.

        Args:
            fresh: step before which the history is dropped → steps that are computed from there on.
        """
        self.gram(stream)
        return self.measured.planner(stream, fresh)

    def predict(self, expected: float, surprise: float | None = None) -> Prediction | None:
        """Predict the PSNR from an expected relative error of the latent; None with too few trials."""
        return self.measured.predict(expected, surprise)

    def affordable(self, seconds: float, typical: StepSeconds | None = None) -> int:
        """Largest number of computed steps that can be denoised within `seconds`.

        Args:
            typical: seconds of the steps; by default those of the calibration's own machine.

        Raises:
            BadRequestError: even a single computed step takes longer.
        """
        typical, steps = typical or self.seconds.steps, self.conditions.steps
        nfe = min(math.floor(typical.affordable(seconds, steps)), steps)
        if nfe < 1:
            least = typical.total(1, steps - 1)
            raise BadRequestError(f"seconds: {seconds:g} given; one computed step alone needs {least:.3g} s")
        return nfe

    def write(self, path: Path, *, overwrite: bool = True) -> None:
        """Write the calibration, whole or not at all; see `whole_file`."""
        with whole_file(path, overwrite=overwrite) as temporary:
            temporary.write_text(self.model_dump_json(by_alias=True) + "\n", encoding="utf-8")


def is_file_name(name: str) -> bool:
    """Return whether a calibration is given as a path, not as the name of a shipped one."""
    return name.endswith(".json") or "/" in name


def load_calibration(name: str) -> Calibration:
    """Load the calibration called `name` in `configs/calibrations/`, or the one in the JSON file `name`.

    Raises:
        BadRequestError: there is none, or it is not valid.
    """
    known = available("calibrations", "json")
    if name in known:
        path = shipped("calibrations", f"{name}.json")
    elif is_file_name(name):
        path = user_path(name)
    else:
        if is_file(user_path(name)):
            check_kind_of_file(user_path(name), "calibration")
        raise BadRequestError(
            f"calibration: {name!r} given; there is no such calibration. Shipped: {', '.join(known)}; "
            f"or give the path of a JSON file written by `lockstep calibrate`{nearest(name, known)}"
        )
    try:
        return _read(path, path.stat().st_mtime_ns)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise BadRequestError(
            f"calibration: {name!r} given; it cannot be read: {reason(error)}; "
            "give a JSON file written by `lockstep calibrate`"
        ) from None


@lru_cache(maxsize=8)
def _read(path: Path, modified: int) -> Calibration:
    text = read_text(path, "calibration")
    try:
        content = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        check_kind_of_file(path, "calibration")
        raise BadRequestError(
            f"calibration: {str(path)!r} is not JSON: {reason(error)}; give a file written by "
            "`lockstep calibrate` (presets and configs are YAML, and name a calibration)"
        ) from None
    if not isinstance(content, dict) or "grams" not in content:
        check_kind(content, "calibration", path)
        what = "some other JSON" if isinstance(content, dict) else shown(content)
        raise BadRequestError(f"calibration: {str(path)!r} is {what}, not a calibration")
    if content.get("schema") != SCHEMA:
        given = shown(content.get("schema"))
        raise BadRequestError(
            f"calibration {str(path)!r}: schema {given}; this version reads schema {SCHEMA}, with which "
            "solvers can be fitted. `lockstep calibrate` makes a new file"
        )
    try:
        return Calibration.model_validate(content)
    except ValidationError as error:
        raise BadRequestError(explain(error, source=f"calibration {path}", model=Calibration)) from None


def _refuse_constant(word: str) -> None:
    raise ValueError(f"it has {word}, which is not a number in JSON")
