"""What a film will take: evaluations, time and rank-seconds of every shot, before anything runs."""

from __future__ import annotations

import json
from dataclasses import dataclass

from rich.table import Table

from launch.film import Film
from runtime.configs import Config
from runtime.film import length
from runtime.presets import load_preset
from runtime.storyboard import ShotRequest
from runtime.windows import Windows
from spectrum import StepKind

_TIMED = ("width", "height", "guidance")  # what the time of a step depends on, beside the model


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a shot takes. `seconds` of denoising is None where no step was timed yet."""

    windows: int
    nfe: int
    seconds: float | None


def estimate(film: Film, number: int) -> Estimate:
    """Evaluations of a shot, and the time by the reports of other shots or its preset's calibration."""
    one = film.shots[number]
    config, preset = one.settings, load_preset(one.request.spectrum)
    kinds = preset.expected_kinds(one.request.steps)
    windows = _windows(one, config)
    nfe = kinds.count(StepKind.COMPUTE)
    times = _step_times(film, one)
    if times is None and preset.calibrated is not None:
        known = preset.calibrated.seconds
        times = known.computed, known.forecast
    if times is None:
        return Estimate(windows, nfe, None)
    return Estimate(windows, nfe, windows * (nfe * times[0] + (len(kinds) - nfe) * times[1]))


def _windows(one: ShotRequest, config: Config) -> int:
    if config.window is None:
        return 1
    total, seen = ((frames - 1) // 4 + 1 for frames in (one.request.frames, config.window.frames))
    return len(Windows.over(total, seen, config.window.overlap // 4))


def _step_times(film: Film, one: ShotRequest) -> tuple[float, float] | None:
    """Seconds of a computed and a forecast step of one window, from a report of a shot of this kind."""
    for path in sorted((film.out / "shots").glob("*.json"), key=lambda p: p.stat().st_mtime, reverse=True):
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
            same = all(report["request"][k] == getattr(one.request, k) for k in _TIMED)
            measured = report["step_seconds"]
            together = report["windows"] if report["request"]["image"] is None else 1  # windows of a step
            if same and measured["computed_median"] is not None:
                return measured["computed_median"] / together, (measured["forecast_median"] or 0.0) / together
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def dry_run_table(film: Film) -> Table:
    """Shots, what they take, and which of them are there."""
    table = Table(title=f"{film.board.title}: {len(film.shots)} shots, {length(film.parts)} frames")
    for column in ("shot", "frames", "windows", "NFE", "denoising, s", "rank-seconds", ""):
        table.add_column(column, justify="left" if column in ("shot", "") else "right")
    total, known = 0.0, True
    for number, one in enumerate(film.shots):
        needed = number in film.missing
        expected = estimate(film, number)
        if needed:
            total, known = total + (expected.seconds or 0.0), known and expected.seconds is not None
        seconds = "unknown" if expected.seconds is None else f"{expected.seconds:.1f}"
        cost = "unknown" if expected.seconds is None else f"{expected.seconds * (film.ranks or 1):.1f}"
        state = "done" if film.done(number) else "to do" if needed else "not wanted"
        table.add_row(
            one.shot.id,
            str(one.request.frames),
            str(expected.windows),
            str(expected.nfe),
            seconds,
            cost,
            state,
        )
    table.caption = f"to do: {total:.1f} s of denoising{'' if known else ', and what is unknown'}"
    return table
