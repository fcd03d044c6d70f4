"""`lockstep plan`: the tables of the best steps to compute for a budget."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from runtime.forecasting.calibration import load_calibration
from runtime.forecasting.methods import Choice, Methods
from runtime.measure.plans import Chosen, step_seconds
from spectrum import CalibratedPredictor, PlannedSteps, StepSeconds
from spectrum.calibration import Prediction

_OVERVIEW = (4, 6, 7, 8, 10, 12, 14, 16, 18, 20, 25, 30, 40, 50, 75, 100, 150, 200)


def overview(name: str, report: Path | None = None) -> Table:
    """Make a table of several budgets; step times from `report` or the calibration.

    A row has each method's expected PSNR, and in brackets what nine of ten videos exceed.
    """
    calibration = load_calibration(name)
    typical = step_seconds(report) or calibration.seconds.steps
    methods, steps = Methods(calibration), calibration.conditions.steps
    table = Table(
        title=f"{name}: plans for {steps} steps",
        caption="predicted PSNR in dB: mean, and in brackets what nine of ten videos exceed; computed steps "
        "are those of the best method",
    )
    columns = ("NFE", "planned", "fitted", "best", "denoising, s", "computed steps")
    for column in columns:
        table.add_column(column, justify="left" if column in ("best", "computed steps") else "right")
    solvers = {fit.nfe for fit in calibration.fits}
    for nfe in sorted({budget for budget in {*_OVERVIEW, *solvers} if budget < steps}):
        best, fitted = methods.best(nfe), methods.fitted(nfe)
        table.add_row(
            str(nfe),
            _graded(methods.planned(nfe)),
            "" if fitted is None else _graded(fitted),
            best.method,
            f"{_seconds(typical, best.plan):.2f}",
            _listed(best.plan.computed),
        )
    return table


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


def _seconds(typical: StepSeconds, plan: PlannedSteps) -> float:
    return typical.total(plan.nfe, plan.steps - plan.nfe)


def _told(prediction: Prediction | None) -> str:
    return "unknown" if prediction is None else f"{prediction.psnr:.1f} ± {prediction.deviation:.1f}"


def _graded(choice: Choice) -> str:
    """Format the mean and the tail of a choice."""
    if choice.prediction is None or choice.tail is None:
        return "unknown"
    return f"{choice.prediction.psnr:.1f} ({choice.tail:.1f})"


def _listed(steps: tuple[int, ...]) -> str:
    return " ".join(str(step) for step in steps)
