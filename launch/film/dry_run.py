"""Estimates the evaluations, time and cost of a film's shots before anything runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from heapq import heapreplace
from pathlib import Path

from rich.table import Table

from launch.film.shots import Film
from launch.shell.terminal import counted
from runtime.files.text import read_json
from runtime.film.assemble import length
from runtime.film.storyboard import ShotRequest
from runtime.parallel.topology import Degrees
from runtime.rehearsal.account import seconds as rehearsal_seconds
from runtime.rehearsal.machine import Gpu
from runtime.rehearsal.rehearse import Scenario, rehearse
from runtime.reports.step_seconds import read_window_seconds
from spectrum import StepKind, StepSeconds

_TIMED = ("width", "height", "guidance")  # what the time of a step depends on, besides model and ranks
_FASTER = ("compile", "fuse_projections", "quantization")  # the same, of the config
_HOUR = 3600.0
_ROWS = 500  # most shots shown; printing thousands would take longer than estimating them


@dataclass(frozen=True, slots=True)
class Estimate:
    """Expected cost of a shot.

    Attributes:
        nfe: evaluations of each window.
        seconds: denoising time, including the full sampler's with `--compare`; None if no step
            was timed yet, and no GPU is named to rehearse it on.
        rank_seconds: `seconds` times the number of ranks.
    """

    nfe: int
    seconds: float | None
    rank_seconds: float | None


def estimate(film: Film, number: int, gpu: Gpu | None = None) -> Estimate:
    """Estimate a shot from reports of others, from its preset's calibration, or by a rehearsal on `gpu`."""
    return _Estimates(film, gpu).of(number)


class _Estimates:
    """Estimates the shots of a film; reads files that several shots share once."""

    def __init__(self, film: Film, gpu: Gpu | None = None):
        self._film, self._gpu = film, gpu
        self._rehearsed: dict[Scenario, StepSeconds] = {}
        self._reports: dict[tuple[object, ...], StepSeconds | None] = {}

    def of(self, number: int) -> Estimate:
        """Estimate one shot; see `estimate`."""
        one = self._film.shots[number]
        nfe, total = one.kinds.count(StepKind.COMPUTE), len(one.kinds)
        typical = self._reported(one) or _calibrated(one) or self._rehearsal(one)
        if typical is None:
            return Estimate(nfe, None, None)
        window = typical.total(nfe, total - nfe)
        if self._film.compare:
            window += typical.total(total, 0)
        seconds = one.windows * window
        return Estimate(nfe, seconds, seconds * self._film.world)

    def _reported(self, one: ShotRequest) -> StepSeconds | None:
        """Seconds of a step of one window, from a report of a similar shot."""
        timed = tuple(getattr(one.request, name) for name in _TIMED)
        performs = asdict(one.settings.performs)
        key = (*timed, *(performs[name] for name in _FASTER), one.settings.model, self._film.world)
        if not self._reports:
            self._reports = reported_seconds(self._film.out / "shots")
        return self._reports.get(key)

    def _rehearsal(self, one: ShotRequest) -> StepSeconds | None:
        """Seconds of a step of one window, estimated by a rehearsal."""
        if self._gpu is None:
            return None
        given = {"prompt": "rehearsed", "negative": "", "travel": (), "seed": 0}
        window = one.settings.windowed(one.request).model_copy(update=given)
        scenario = Scenario(one.settings, window, Degrees(), self._film.world, self._gpu)
        if scenario not in self._rehearsed:
            took = rehearsal_seconds(rehearse(scenario, [0]))
            self._rehearsed[scenario] = StepSeconds(took["computed_step"], took["forecast_step"])
        return self._rehearsed[scenario]


def _calibrated(one: ShotRequest) -> StepSeconds | None:
    """Seconds of a step of one window, from the calibration of a shot's preset."""
    calibrated = one.preset.calibrated
    return None if calibrated is None else calibrated.seconds.steps


def reported_seconds(folder: Path) -> dict[tuple[object, ...], StepSeconds | None]:
    """Map what the time of a step depends on to the seconds of a step of one window. Never empty.

    Of reports of the same kind, the newest counts.
    """
    found: dict[tuple[object, ...], StepSeconds | None] = {(): None}
    for path in sorted(folder.glob("[!.]*.json"), key=_modified):
        try:
            report = read_json(path)
            timed = tuple(report["request"][name] for name in _TIMED)
            faster = (report["performance"][name] for name in _FASTER)
            key = (*timed, *faster, report["model"]["name"], report["topology"]["world"])
            measured = read_window_seconds(report)
            if measured.computed is not None:
                found[key] = StepSeconds(measured.computed, measured.forecast or 0.0)
        except (OSError, ValueError, KeyError, TypeError, ArithmeticError):
            continue
    return found


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # removed meanwhile
        return 0.0


def dry_run_table(film: Film, replicas: int = 1, price: float | None = None, gpu: Gpu | None = None) -> Table:
    """Make the table of `--dry-run`: shots, their expected cost, and which are done.

    Args:
        replicas: number of shots made at a time.
        price: price of one rank for an hour, in any currency.
        gpu: GPU on which steps that were never timed are rehearsed.
    """
    shots = counted(len(film.shots), "shot")
    table = Table(title=f"{film.board.title}: {shots}, {length(film.parts)} frames")
    priced = [] if price is None else ["cost"]
    for column in ("shot", "frames", "windows", "NFE", "denoising, s", "rank seconds", *priced, ""):
        table.add_column(column, justify="left" if column in ("shot", "") else "right")
    missing, todo, estimates = set(film.missing), [], _Estimates(film, gpu)
    for number, one in enumerate(film.shots):
        expected = estimates.of(number)
        if number in missing:
            todo.append(expected)
        if number >= _ROWS:
            continue
        table.add_row(
            one.shot.id,
            str(one.request.frames),
            str(one.windows),
            str(expected.nfe),
            *_amounts(expected.seconds, expected.rank_seconds, price),
            "done" if film.done(number) else "to do" if number in missing else "not selected",
        )
    if len(film.shots) > _ROWS:
        table.add_row("…", *[""] * (len(table.columns) - 2), f"{len(film.shots) - _ROWS} more")
    lasting = _on_replicas((one.seconds or 0.0 for one in todo), replicas)
    amounts = _amounts(lasting, sum(one.rank_seconds or 0.0 for one in todo), price)
    names = (f"s of denoising on {counted(replicas, 'replica')}", "rank-seconds", "in cost")
    said = [f"{amount} {name}" for amount, name in zip(amounts, names, strict=False)]
    said += dict.fromkeys(
        f"preset {one.request.preset}{one.chosen and f' ({one.chosen})'}" for one in film.shots
    )
    if any(one.seconds is None for one in todo):
        said.append("plus shots that were never timed")
    if performs := {text for one in film.shots if (text := one.settings.performs.text) != "exact"}:
        said.append(f"performance {', '.join(sorted(performs))}")
    if gpu is not None:
        said.append(f"estimated by a rehearsal on {gpu.name} where there is no report")
    table.caption = f"to do: {', '.join(said)}"
    return table


def _amounts(seconds: float | None, rank_seconds: float | None, price: float | None) -> list[str]:
    """Format seconds, rank-seconds and, if there is a price, the cost."""
    if seconds is None or rank_seconds is None:
        return ["unknown"] * (2 if price is None else 3)
    cost = [] if price is None else [f"{rank_seconds / _HOUR * price:.4f}"]
    return [f"{seconds:.1f}", f"{rank_seconds:.1f}", *cost]


def _on_replicas(seconds: Iterable[float], replicas: int) -> float:
    """Total seconds if each shot in turn goes to the replica that is free first."""
    free = [0.0] * replicas
    for lasts in seconds:
        heapreplace(free, free[0] + lasts)
    return max(free)
