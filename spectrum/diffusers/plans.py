"""Plans: which steps a pipeline computes and how the others are forecast, as its calibration says."""

from __future__ import annotations

import json
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from spectrum.calibrated import CalibratedPredictor
from spectrum.calibration import SCHEMA, Measured, Prediction
from spectrum.diffusers.conditions import Conditions
from spectrum.diffusers.presets import Preset
from spectrum.planner import PlannedSteps
from spectrum.schedule import FixedSchedule, Schedule

_NUMBERS = ("noise_levels", "trajectory", "sensitivity", "response")


@dataclass(frozen=True, slots=True)
class Plan(Preset):
    """A preset for one pipeline, scheduler, number of steps and guidance.

    Attributes:
        planned: computed steps, and the errors expected of forecasts.
        prediction: expected PSNR against the full sampler, dB; None with too few trials.
    """

    planned: PlannedSteps | None = None
    prediction: Prediction | None = None

    @property
    def computed(self) -> tuple[int, ...]:
        """Computed steps, ascending."""
        return () if self.planned is None else self.planned.computed


def plan(file: str | PathLike[str], *, nfe: int) -> Plan:
    """Find the best steps to compute.

    Args:
        file: a file that `calibrate` has made.
        nfe: number of computed steps.

    Raises:
        ValueError: the file is no calibration, or `nfe` is not possible; the message says why.

    Example:
        >>> enable(pipe, plan("flux.json", nfe=12))  # doctest: +SKIP
    """
    if isinstance(nfe, bool) or not isinstance(nfe, int) or nfe < 1:
        raise ValueError(f"nfe: {nfe!r} given; it must be the number of steps to compute, at least 1")
    content = read_calibration(file)
    measured, source = _measured(content), Path(file).name
    try:
        planned = measured.planner("guided").plan(nfe)
    except ValueError as error:
        raise ValueError(f"plan of {source!r}: {error}") from None
    return planned_preset(
        f"{nfe} of {planned.steps} steps by {source}",
        planned,
        measured.predictor("guided"),
        conditions=Conditions(source, content["conditions"], tuple(content["noise_levels"])),
        prediction=measured.predict(planned.error),
    )


def planned_preset(name: str, planned: PlannedSteps, predictor: CalibratedPredictor, **others: Any) -> Plan:
    """Make a preset that computes the planned steps and forecasts what the transformer returns at the others.

    Guidance is a weighted sum of what is forecast, so weights that are best for the guided velocity are used
    for each of its branches. A calibration knows the steps of all transformers of a pipeline, so they go on
    with each other's history.
    """

    def schedule(steps: int) -> Schedule:
        if steps != planned.steps:
            raise ValueError(f"it is planned for {planned.steps} steps")
        return FixedSchedule(planned.steps, planned.computed)

    return Plan(name, schedule, lambda steps: predictor, "velocity", carried=True, planned=planned, **others)


def read_calibration(file: str | PathLike[str]) -> dict[str, Any]:
    """Read a calibration file of this or of Lockstep's own making.

    Raises:
        ValueError: it cannot be read, or is no calibration of a pipeline.
    """
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"calibration {str(file)!r} cannot be read: {error}") from None
    if not isinstance(content, dict) or "grams" not in content:
        raise ValueError(f"{str(file)!r} is not a calibration; calibrate(...) makes one")
    if content.get("schema") != SCHEMA:
        raise ValueError(
            f"calibration {str(file)!r}: schema {content.get('schema')!r}; this version reads schema {SCHEMA}"
        )
    if "pipeline" not in content.get("conditions", {}):
        raise ValueError(
            f"calibration {str(file)!r} was not made with a pipeline of diffusers; "
            "calibrate(...) makes one that was"
        )
    try:
        _measured(content).check(content["conditions"]["steps"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"calibration {str(file)!r} is damaged: {type(error).__name__}: {error}; make it again"
        ) from None
    return content


def _measured(content: dict[str, Any]) -> Measured:
    trials = [SimpleNamespace(**trial) for trial in content["trials"]]
    numbers = {name: [float(value) for value in content[name]] for name in _NUMBERS}
    return Measured(grams=content["grams"], scale=float(content["scale"]), trials=trials, **numbers)
