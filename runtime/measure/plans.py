"""Plans: the best steps to compute for a budget, as a calibration tells, and the presets that run them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from runtime.errors import BadRequestError, named
from runtime.files.atomic import whole_file
from runtime.files.checks import check_apart, check_suffix, check_writable
from runtime.files.kinds import PICTURE, PRESET, check_kind
from runtime.files.text import read_json, user_path
from runtime.forecasting.calibration import Calibration, is_file_name, load_calibration
from runtime.forecasting.methods import Choice, Method, Methods
from runtime.reports.step_seconds import read_step_seconds
from spectrum import PlannedSteps, StepSeconds


@dataclass(frozen=True, slots=True)
class Chosen:
    """The best plan for a budget.

    Attributes:
        name: name or path of the calibration.
        calibration: the calibration.
        choice: the method, with its plan.
        typical: seconds of steps, from which those of the plan are predicted.
    """

    name: str
    calibration: Calibration
    choice: Choice
    typical: StepSeconds

    @property
    def plan(self) -> PlannedSteps:
        """The steps to compute, and the expected errors of the others."""
        return self.choice.plan

    @property
    def method(self) -> Method:
        """`planned` (forecasts) or `fitted` (a solver)."""
        return self.choice.method

    @property
    def nfe(self) -> int:
        """Number of steps to compute."""
        return self.plan.nfe

    @property
    def steps(self) -> int:
        """Number of all steps."""
        return self.plan.steps

    @property
    def computed(self) -> tuple[int, ...]:
        """Numbers of the steps to compute, from 0."""
        return self.plan.computed

    @property
    def psnr(self) -> float | None:
        """Expected PSNR in dB against the full sampler; None if the calibration cannot tell."""
        return None if self.choice.prediction is None else self.choice.prediction.psnr

    @property
    def seconds(self) -> float:
        """Expected seconds of denoising."""
        return self.typical.total(self.nfe, self.steps - self.nfe)

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write a preset that runs the plan, and return the file's path, which a request's `spectrum` takes.

        Args:
            path: the YAML file.
            overwrite: whether a preset of this name may be replaced.

        Raises:
            BadRequestError: the file cannot be written.
        """
        path = user_path(str(path))
        check_outputs(self.name, picture=None, preset=path, overwrite=overwrite)
        write_plan(self, picture=None, preset=path, overwrite=overwrite)
        return path


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
        raise BadRequestError(f"{', '.join(named) or 'nfe'}: give exactly one of nfe, psnr and seconds")
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
