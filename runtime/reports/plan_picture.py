"""Picture of a planned schedule: computed steps, expected errors, and the sensitivity of the result."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, PercentFormatter

from runtime.files.atomic import whole_file
from runtime.forecasting.calibration import Calibration
from runtime.forecasting.methods import Choice
from runtime.reports.run_picture import COLOURS
from spectrum import StepKind


def write_plan_picture(
    calibration: Calibration, choice: Choice, path: Path, *, overwrite: bool = True
) -> None:
    """Draw a plan as a PNG, whole or not at all; see `whole_file`."""
    plan = choice.plan
    figure = Figure(figsize=(9, 5.2), layout="constrained", dpi=130)
    errors, sensitivity = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    steps = range(plan.steps)
    kinds = [StepKind.COMPUTE if step in plan.computed else StepKind.FORECAST for step in steps]
    known = [(step, error) for step, error in enumerate(plan.errors) if error]
    errors.bar(
        [step for step, _ in known],
        [error for _, error in known],
        color=[COLOURS[kinds[step]] for step, _ in known],
        alpha=0.9,
    )
    errors.set_ylabel("expected relative error\nof a forecast")
    errors.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    for step in plan.computed:
        errors.axvspan(step - 0.5, step + 0.5, color=COLOURS[StepKind.COMPUTE], alpha=0.12, lw=0)
    sensitivity.plot(list(steps), calibration.sensitivity, "o-", ms=3, lw=1, color="#555555")
    sensitivity.set_yscale("log")
    sensitivity.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    sensitivity.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    sensitivity.yaxis.set_minor_locator(NullLocator())
    sensitivity.set_ylabel("sensitivity\nof the result")
    sensitivity.set_xlabel("step")
    for axes in (errors, sensitivity):
        axes.spines[["top", "right"]].set_visible(False)
    computed = f"{plan.nfe} of {plan.steps} steps computed (shaded)"
    lines = [f"{calibration.conditions.model} · {choice.method}, {computed}"]
    if (prediction := choice.prediction) is not None:
        lines.append(f"predicted PSNR {prediction.psnr:.1f} ± {prediction.deviation:.1f} dB")
    figure.suptitle(" · ".join(lines), fontsize=10, parse_math=False)
    with whole_file(path, overwrite=overwrite) as temporary:
        figure.savefig(temporary, format="png")
