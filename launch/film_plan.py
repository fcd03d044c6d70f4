"""What a film will take: evaluations, time and cost of every shot, before anything runs."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from heapq import heapreplace

from rich.table import Table

from launch.film import Film
from runtime.film import length
from runtime.presets import load_preset
from runtime.storyboard import ShotRequest
from spectrum import StepKind

_TIMED = ("width", "height", "guidance")  # what the time of a step depends on, beside model and ranks
_HOUR = 3600.0


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a shot takes.

    Attributes:
        nfe: evaluations of each window.
        seconds: of denoising, with the full sampler's where the film is compared with it; None where no step
            was timed yet.
        rank_seconds: the same, for all ranks that make it.
    """

    nfe: int
    seconds: float | None
    rank_seconds: float | None


def estimate(film: Film, number: int) -> Estimate:
    """Evaluations of a shot, and the time by the reports of other shots or its preset's calibration."""
    one = film.shots[number]
    preset = load_preset(one.request.spectrum)
    kinds = preset.expected_kinds(one.request.steps)
    nfe = kinds.count(StepKind.COMPUTE)
    times = _step_times(film, one)
    if times is None and preset.calibrated is not None:
        known = preset.calibrated.seconds
        times = known.computed, known.forecast
    if times is None:
        return Estimate(nfe, None, None)
    computed, forecast = times
    window = nfe * computed + (len(kinds) - nfe) * forecast
    if film.compare:
        window += len(kinds) * computed
    seconds = one.windows * window
    return Estimate(nfe, seconds, seconds * film.world)


def _step_times(film: Film, one: ShotRequest) -> tuple[float, float] | None:
    """Seconds of a computed and a forecast step of one window, from a report of a shot of this kind."""
    for path in sorted((film.out / "shots").glob("*.json"), key=lambda p: p.stat().st_mtime, reverse=True):
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
            same = all(report["request"][k] == getattr(one.request, k) for k in _TIMED)
            same &= (report["model"]["name"], report["topology"]["world"]) == (one.settings.model, film.world)
            measured = report["step_seconds"]
            together = report["windows"] if report["request"]["image"] is None else 1  # windows of a step
            if same and measured["computed_median"] is not None:
                return measured["computed_median"] / together, (measured["forecast_median"] or 0.0) / together
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def dry_run_table(film: Film, replicas: int = 1, price: float | None = None) -> Table:
    """Shots, what they take, and which of them are there.

    Args:
        replicas: that make them at a time.
        price: of an hour of one rank, in any currency.
    """
    table = Table(title=f"{film.board.title}: {len(film.shots)} shots, {length(film.parts)} frames")
    priced = [] if price is None else ["cost"]
    for column in ("shot", "frames", "windows", "NFE", "denoising, s", "rank-seconds", *priced, ""):
        table.add_column(column, justify="left" if column in ("shot", "") else "right")
    missing, todo = film.missing, []
    for number, one in enumerate(film.shots):
        expected = estimate(film, number)
        if number in missing:
            todo.append(expected)
        table.add_row(
            one.shot.id,
            str(one.request.frames),
            str(one.windows),
            str(expected.nfe),
            *_amounts(expected.seconds, expected.rank_seconds, price),
            "done" if film.done(number) else "to do" if number in missing else "not wanted",
        )
    lasting = _on_replicas((one.seconds or 0.0 for one in todo), replicas)
    amounts = _amounts(lasting, sum(one.rank_seconds or 0.0 for one in todo), price)
    names = (f"s of denoising on {replicas} replica{'s' if replicas > 1 else ''}", "rank-seconds", "in cost")
    said = [f"{amount} {name}" for amount, name in zip(amounts, names, strict=False)]
    if any(one.seconds is None for one in todo):
        said.append("what is unknown")
    table.caption = f"to do: {', '.join(said)}"
    return table


def _amounts(seconds: float | None, rank_seconds: float | None, price: float | None) -> list[str]:
    """As they are shown, the cost only where there is a price."""
    if seconds is None or rank_seconds is None:
        return ["unknown"] * (2 if price is None else 3)
    cost = [] if price is None else [f"{rank_seconds / _HOUR * price:.4f}"]
    return [f"{seconds:.1f}", f"{rank_seconds:.1f}", *cost]


def _on_replicas(seconds: Iterable[float], replicas: int) -> float:
    """How long shots take when each goes, in order, to the replica that is free first."""
    free = [0.0] * replicas
    for lasts in seconds:
        heapreplace(free, free[0] + lasts)
    return max(free)
