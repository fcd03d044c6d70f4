"""`lockstep plan`: the tables of the best steps to compute for a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from runtime.forecasting.calibration import load_calibration
from runtime.forecasting.methods import Choice, Methods
from runtime.measure.plans import Chosen, step_seconds
from spectrum import CalibratedPredictor, PlannedSteps
from spectrum.calibration import Prediction

_OVERVIEW = (4, 6, 7, 8, 10, 12, 14, 16, 18, 20, 25, 30, 40, 50, 75, 100, 150, 200)


@dataclass(frozen=True, slots=True)
class Budget:
    """What a calibration expects of one number of computed steps.

    Attributes:
        steps: number of all steps.
        planned, fitted: the method's choice; None if there is no solver for that number.
        best: the better of these.
        seconds: expected seconds of denoising.
    """

    steps: int
    planned: Choice
    fitted: Choice | None
    best: Choice
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        given = {"planned": self.planned, "fitted": self.fitted}
        methods = {name: None if one is None else _expected(one) for name, one in given.items()}
        plan = self.best.plan
        about = {"nfe": plan.nfe, "steps": self.steps, "seconds": self.seconds}
        return {**about, **methods, "best": self.best.method, "computed": [*plan.computed]}


def overview(name: str, report: Path | None = None) -> list[Budget]:
    """What a calibration expects of several budgets; step times from `report` or the calibration."""
    calibration = load_calibration(name)
    typical = step_seconds(report) or calibration.seconds.steps
    methods, steps = Methods(calibration), calibration.conditions.steps
    budgets = {*_OVERVIEW, *(fit.nfe for fit in calibration.fits)}
    found = []
    for nfe in sorted(budget for budget in budgets if budget < steps):
        best = methods.best(nfe)
        seconds = typical.total(best.plan.nfe, steps - best.plan.nfe)
        found.append(Budget(steps, methods.planned(nfe), methods.fitted(nfe), best, seconds))
    return found


def overview_table(name: str, budgets: Sequence[Budget]) -> Table:
    """Make a table of several budgets.

    A row has each method's expected PSNR, and in brackets what nine of ten videos exceed.
    """
    table = Table(
        title=f"{name}: plans for {budgets[0].steps if budgets else 0} steps",
        caption="predicted PSNR in dB: mean, and in brackets what nine of ten videos exceed; computed steps "
        "are those of the best method",
    )
    columns = ("NFE", "planned", "fitted", "best", "denoising, s", "computed steps")
    for column in columns:
        steps = column == "computed steps"
        table.add_column(column, justify="left" if steps or column == "best" else "right", no_wrap=not steps)
    for one in budgets:
        table.add_row(
            str(one.best.plan.nfe),
            _graded(one.planned),
            "" if one.fitted is None else _graded(one.fitted),
            one.best.method,
            f"{one.seconds:.2f}",
            _listed(one.best.plan.computed),
        )
    return table


def to_json(chosen: Chosen) -> dict[str, Any]:
    """Return a plan as JSON has it."""
    return {
        "calibration": chosen.name,
        "method": chosen.method,
        "nfe": chosen.nfe,
        "steps": chosen.steps,
        "computed": [*chosen.computed],
        "seconds": chosen.seconds,
        **_expected(chosen.choice),
        "errors": [*chosen.plan.errors],
        "noise_levels": chosen.calibration.noise_levels[: chosen.steps],
        "sensitivity": chosen.calibration.sensitivity,
    }


def steps_table(chosen: Chosen) -> Table:
    """Make a table with a row for each step."""
    plan, calibration, method = chosen.plan, chosen.calibration, chosen.choice.method
    unit = "" if chosen.choice.prediction is None else " dB"
    table = Table(
        title=f"{chosen.name}: {plan.nfe} of {plan.steps} steps, {method}, "
        f"predicted PSNR {_told(chosen.choice.prediction)}{unit}, "
        f"denoising {chosen.seconds:.3g} s",
        caption="error: expected error of the forecast; at a computed step, of the forecast that is not used",
    )
    for column in ("step", "", "weights", "noise level", "expected error", "sensitivity"):
        table.add_column(column, justify="left" if not column else "right")
    predictor = calibration.predictor("guided")
    left_out = "forecast" if method == "planned" else "skipped"
    for step, error in enumerate(plan.errors):
        forecast = step not in plan.computed and method == "planned"
        table.add_row(
            str(step),
            "computed" if step in plan.computed else left_out,
            _weights(predictor, plan, step) if forecast else "",
            f"{calibration.noise_levels[step]:.3f}",
            "" if error is None else f"{100 * error:.2f} %",
            f"{calibration.sensitivity[step]:.2f}",
        )
    return table


def _weights(predictor: CalibratedPredictor, plan: PlannedSteps, step: int) -> str:
    """Format the weights of the two remembered steps, the earlier first."""
    history = [computed for computed in plan.computed if computed < step][-2:]
    return " ".join(f"{weight:+.2f}" for weight in predictor.weights(history, step))


def _expected(choice: Choice) -> dict[str, float | None]:
    """Expected PSNR, its standard deviation, and what nine of ten videos exceed; None if it is unknown."""
    known = choice.prediction
    psnr, deviation = (None, None) if known is None else (known.psnr, known.deviation)
    return {"psnr": psnr, "deviation": deviation, "tail": choice.tail}


def _told(prediction: Prediction | None) -> str:
    return "unknown" if prediction is None else f"{prediction.psnr:.1f} ± {prediction.deviation:.1f}"


def _graded(choice: Choice) -> str:
    """Format the mean and the tail of a choice."""
    if choice.prediction is None or choice.tail is None:
        return "unknown"
    return f"{choice.prediction.psnr:.1f} ({choice.tail:.1f})"


def _listed(steps: tuple[int, ...]) -> str:
    return " ".join(str(step) for step in steps)
