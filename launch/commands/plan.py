"""`lockstep plan`: finds the best steps to compute for a budget; writes a table, a picture and a preset."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml
from rich.table import Table

from runtime.errors import BadRequestError, named
from runtime.files.atomic import whole_file
from runtime.files.checks import check_apart, check_suffix, check_writable
from runtime.files.kinds import PICTURE, PRESET, check_kind
from runtime.files.text import read_json, user_path
from runtime.forecasting.calibration import Calibration, is_file_name, load_calibration
from runtime.forecasting.methods import Choice, Method, Methods
from runtime.forecasting.trials import Prediction
from runtime.reports.step_seconds import read_step_seconds
from spectrum import CalibratedPredictor, PlannedSteps, StepSeconds

_OVERVIEW = (4, 6, 7, 8, 10, 12, 14, 16, 18, 20, 25, 30, 40, 50, 75, 100, 150, 200)


@dataclass(frozen=True, slots=True)
class Chosen:
    """A method with its plan, the calibration, and the seconds of steps from which its own are predicted."""

    name: str
    calibration: Calibration
    choice: Choice
    typical: StepSeconds

    @property
    def plan(self) -> PlannedSteps:
        return self.choice.plan


def make_plan(
    name: str,
    *,
    nfe: int | None = None,
    psnr: float | None = None,
    seconds: float | None = None,
    report: Path | None = None,
    method: Method | None = None,
) -> Chosen:
    """Find the best plan of the calibration `name` for one budget, of one method or of all.

    Raises:
        BadRequestError: not exactly one budget, or one that cannot be met.
    """
    given = {"nfe": nfe, "psnr": psnr, "seconds": seconds}
    named = [budget for budget, value in given.items() if value is not None]
    if len(named) != 1:
        raise BadRequestError(f"{', '.join(named) or 'nfe'}: give one of --nfe, --psnr and --seconds")
    calibration = load_calibration(name)
    typical, methods = step_seconds(report) or calibration.seconds.steps, Methods(calibration)
    if nfe is not None:
        choice = methods.best(nfe, method)
    elif psnr is not None:
        choice = methods.for_psnr(psnr, method)
    else:
        assert seconds is not None
        choice = methods.for_seconds(seconds, typical, method)
    return Chosen(name, calibration, choice, typical)


def step_seconds(report: Path | None) -> StepSeconds | None:
    """Read the seconds of a report's steps; None without a report.

    Raises:
        BadRequestError: it has none of one kind, or is not a report.
    """
    if report is None:
        return None
    try:
        content = read_json(report)
        check_kind(content, "report", report)
        found, problem = read_step_seconds(content), "it computed or forecast none"
    except (OSError, ValueError, KeyError, TypeError) as error:
        found, problem = StepSeconds(), named(error)
    if not (found.computed and found.forecast):
        raise BadRequestError(
            f"report: {str(report)!r} has no times of computed and forecast steps: {problem}"
        )
    return found


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
        f"denoising {_seconds(chosen.typical, plan):.3g} s",
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


def check_outputs(
    name: str, *, picture: Path | None, preset: Path | None, overwrite: bool, report: Path | None = None
) -> None:
    """Refuse outputs of a plan that cannot be written.

    Args:
        name, report: calibration and report that the plan is made with, which no output may replace.

    Raises:
        BadRequestError: an output exists, cannot be written, has the wrong suffix, or is an input.
    """
    if picture is not None:
        check_suffix(picture, ".png", field="picture")
    if preset is not None:
        check_suffix(preset, ".yaml", ".yml", field="preset")
    outputs = {path: field for path, field in ((picture, "picture"), (preset, "preset")) if path is not None}
    inputs = {user_path(name): "calibration"} if is_file_name(name) else {}
    check_apart(outputs, inputs | ({} if report is None else {report: "report"}))
    kinds = {"picture": PICTURE, "preset": PRESET}
    for path, field in outputs.items():
        check_writable(path, overwrite=overwrite, field=field, kind=kinds[field])


def write_plan(chosen: Chosen, *, picture: Path | None, preset: Path | None, overwrite: bool) -> None:
    """Write the picture and the preset that are asked for, each whole or not at all."""
    name = chosen.name
    if preset is not None:
        content = {
            **chosen.choice.preset,
            "calibration": str(user_path(name).absolute()) if is_file_name(name) else name,
        }
        with whole_file(preset, overwrite=overwrite) as temporary:
            temporary.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    if picture is not None:
        from runtime.reports.plan_picture import write_plan_picture

        write_plan_picture(chosen.calibration, chosen.choice, picture, overwrite=overwrite)


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
