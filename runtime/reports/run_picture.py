"""Picture of a run: the kind and duration of every step, and its forecast error where known."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from runtime.reports.report import Report, StepPart
from spectrum import StepKind

COLOURS = {StepKind.COMPUTE: "#1f4e79", StepKind.FORECAST: "#f0a030"}
_DIGITS = (  # number of decades that an axis spans → its labels
    (0.4, range(1, 10)),
    (0.7, (1, 2, 3, 5, 7)),
    (2.0, (1, 2, 5)),
    (math.inf, (1,)),
)
_NAMES = {StepKind.COMPUTE: "computed", StepKind.FORECAST: "forecast"}
_SOLVED = {StepKind.COMPUTE: "computed", StepKind.FORECAST: "skipped"}  # by a fitted solver


def write_picture(report: Report, path: Path) -> None:
    """Draw `report` as a PNG."""
    figure = Figure(figsize=(9, 5.2), layout="constrained", dpi=130)
    times, errors = figure.subplots(2, 1, sharex=True, height_ratios=(1, 1))
    solved = report.spectrum["schedule"]["kind"] == "fitted"
    _draw_times(times, report.step_log, _SOLVED if solved else _NAMES)
    _draw_errors(errors, report.step_log)
    figure.suptitle(title_of(report), fontsize=10, parse_math=False)  # names may hold a $
    figure.savefig(path, format="png")


def _draw_times(axes: Axes, steps: list[StepPart], names: dict[StepKind, str]) -> None:
    axes.bar(
        [s.index for s in steps],
        [1000 * s.seconds for s in steps],
        color=[COLOURS[s.kind] for s in steps],
        width=0.8,
    )
    axes.set_ylabel("time of the step, ms")
    counts = {kind: sum(s.kind is kind for s in steps) for kind in StepKind}
    axes.legend(
        handles=[
            Patch(color=COLOURS[kind], label=f"{count} {names[kind]}") for kind, count in counts.items()
        ],
        loc="upper right",
        bbox_to_anchor=(1.0, 1.18),
        ncols=2,
        frameon=False,
        fontsize=9,
    )
    axes.spines[["top", "right"]].set_visible(False)


def _draw_errors(axes: Axes, steps: list[StepPart]) -> None:
    """Draw forecast errors: measured ones at computed steps, and expected ones from a calibration."""
    known = [(s.index, s.error) for s in steps if s.error is not None]
    expected = [(s.index, s.expected) for s in steps if s.expected]
    for step in steps:
        if step.kind is StepKind.FORECAST:
            axes.axvspan(
                step.index - 0.4, step.index + 0.4, color=COLOURS[StepKind.FORECAST], alpha=0.18, lw=0
            )
    if known:
        if expected:
            axes.plot(*zip(*expected, strict=True), ".-", color="#999999", lw=1, ms=4, label="expected")
        axes.plot(
            *zip(*known, strict=True), "o-", color=COLOURS[StepKind.COMPUTE], lw=1, ms=4, label="measured"
        )
        axes.legend(loc="best", frameon=False, fontsize=9)
        scale_errors(axes, [error for _, error in (*known, *expected)])
    else:
        axes.text(0.5, 0.5, "nothing was forecast", transform=axes.transAxes, ha="center", color="#777777")
        axes.set_yticks([])
    axes.set_ylabel("relative forecast error")
    axes.set_xlabel("step")
    axes.set_xlim(-0.8, len(steps) - 0.2)
    axes.spines[["top", "right"]].set_visible(False)


def scale_errors(axes: Axes, errors: list[float]) -> None:
    """Scale the y axis for `errors`, in per cent: linear if they are nearly alike, otherwise logarithmic with
    as many labels as have room."""
    percent = FuncFormatter(lambda error, _: f"{100 * error:.4g}%")
    axes.yaxis.set_major_formatter(percent)
    positive = [error for error in errors if error > 0]
    if not positive or max(positive) < 1.5 * min(positive):
        return
    decades = math.log10(max(positive) / min(positive))
    axes.set_yscale("log")
    digits = next(digits for width, digits in _DIGITS if decades < width)
    axes.yaxis.set_major_locator(LogLocator(subs=digits))
    axes.yaxis.set_major_formatter(percent)
    axes.yaxis.set_minor_locator(NullLocator())


def title_of(report: Report) -> str:
    """Title of a run's picture: model, size, preset by its file's name, and what is known of its quality."""
    request = report.request
    size = f"{request['width']}×{request['height']}×{request['frames']}"
    preset = Path(request["spectrum"]).name  # folders are of no interest, nor everybody's business
    lines = [f"{report.model.name} · {size} · {preset} · NFE {report.nfe.cond} of {report.steps}"]
    if report.expectation.psnr is not None:
        lines.append(f"expected PSNR {report.expectation.psnr:.1f} ± {report.expectation.deviation:.1f} dB")
    elif report.expectation.note and report.quality is None:
        lines.append(report.expectation.note)
    if report.quality is not None and report.comparison is not None:
        vmaf = "" if report.quality.vmaf is None else f" · VMAF {report.quality.vmaf:.1f}"
        lines.append(
            f"denoising {report.comparison.speedup:.2f}× faster than the full sampler "
            f"(ideal {report.comparison.ideal_speedup:.2f}×) · PSNR {report.quality.psnr:.1f} dB · "
            f"SSIM {report.quality.ssim:.4f}{vmaf}"
        )
    return "\n".join(lines)
