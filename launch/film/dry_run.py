"""Estimates the evaluations, time and cost of a film's shots before anything runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from heapq import heapreplace
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from launch.film.shots import Film
from launch.shell.terminal import counted
from runtime.files.text import read_json
from runtime.film.assemble import length
from runtime.film.storyboard import ShotRequest
from runtime.models.folder import is_local, settings_of
from runtime.parallel.topology import Degrees
from runtime.profile import ModelProfile
from runtime.rehearsal.account import seconds as rehearsal_seconds
from runtime.rehearsal.machine import Gpu
from runtime.rehearsal.published import PUBLISHED
from runtime.rehearsal.rehearse import Scenario, rehearse
from runtime.rehearsal.settings import RehearsedProfile
from runtime.reports.step_seconds import read_window_seconds
from runtime.request.config import Config
from spectrum import StepKind, StepSeconds

_TIMED = ("width", "height", "guidance")  # what the time of a step depends on, besides model and ranks
_FASTER = ("compile", "fuse_projections", "fuse_forecasts", "overlap_exchanges", "quantization")
"""The same, of the config."""
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


def profile_of(config: Config) -> ModelProfile:
    """Profile of a shot's model, none of whose weights are downloaded: its settings suffice for an estimate.

    Raises:
        BadRequestError: the model is not supported, its settings cannot be found, or a LoRA does not fit.
    """
    if is_local(config):
        return ModelProfile(config)
    if config.model not in PUBLISHED:
        settings_of(config.model, config.revision)  # into the download cache, where they are found
    profile = RehearsedProfile(config)
    return profile.with_loras(profile.folder.with_loras(config.lora))


def estimate(film: Film, number: int, gpu: Gpu | None = None) -> Estimate:
    """Estimate a shot from reports of others, from its preset's calibration, or by a rehearsal on `gpu`."""
    return _Estimates(film, gpu).of(number)


class _Estimates:
    """Estimates the shots of a film; reads files that several shots share once."""

    def __init__(self, film: Film, gpu: Gpu | None = None):
        self._film, self._gpu = film, gpu
        self._rehearsed: dict[Scenario, StepSeconds] = {}
        self.places: dict[str, None] = {}  # what became of memory options that are `auto`, in order
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
        batched = (False,) if performs["batch_guidance"] == "never" else (True, False)  # as ranks decide
        found = (self._reports.get((*key, one_batch)) for one_batch in batched)
        return next((seconds for seconds in found if seconds is not None), None)

    def _rehearsal(self, one: ShotRequest) -> StepSeconds | None:
        """Seconds of a step of one window, estimated by a rehearsal."""
        if self._gpu is None:
            return None
        given = {"prompt": "rehearsed", "negative": "", "travel": (), "seed": 0}
        window = one.settings.windowed(one.request).model_copy(update=given)
        scenario = Scenario(one.settings, window, Degrees(), self._film.world, self._gpu)
        if scenario not in self._rehearsed:
            found = rehearse(scenario, [0])
            self.places |= {f"{name}: {place}": None for name, place in found.decided.items()}
            took = rehearsal_seconds(found)
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
            own = (report["model"]["name"], report["topology"]["world"])
            key = (*timed, *faster, *own, report["performance"]["batch_guidance"])
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


@dataclass(frozen=True, slots=True)
class DryRun:
    """What making a film is expected to take.

    Attributes:
        film: the film.
        estimates: of all its shots, in order.
        missing: numbers of the shots that are to be made now.
        replicas: number of shots made at a time.
        price: price of one rank for an hour, in any currency; None if it is not known.
        gpu: name of the GPU on which steps that were never timed were rehearsed; empty for none.
        places: what became of memory options that are `auto` in these rehearsals.
    """

    film: Film
    estimates: Sequence[Estimate]
    missing: Sequence[int]
    replicas: int
    price: float | None
    gpu: str
    places: Sequence[str] = ()

    @property
    def todo(self) -> list[Estimate]:
        """Estimates of the shots that are to be made now."""
        return [self.estimates[number] for number in self.missing]

    @property
    def seconds(self) -> float:
        """Seconds of denoising on all replicas, of the shots whose time is known."""
        return _on_replicas((one.seconds or 0.0 for one in self.todo), self.replicas)

    @property
    def rank_seconds(self) -> float:
        """Seconds that ranks are busy, likewise."""
        return sum(one.rank_seconds or 0.0 for one in self.todo)

    def state(self, number: int) -> str:
        """State of a shot."""
        if self.film.done(number):
            return "done"
        return "to do" if number in self.missing else "not selected"

    @property
    def presets(self) -> list[str]:
        """Presets of the shots, each with the reason if it was chosen."""
        told = (f"{one.request.preset}{one.chosen and f' ({one.chosen})'}" for one in self.film.shots)
        return [*dict.fromkeys(told)]

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        shots = [
            {
                "id": one.shot.id,
                "frames": one.request.frames,
                "windows": one.windows,
                "preset": one.request.preset,
                "chosen": one.chosen or None,
                "state": self.state(number),
                **asdict(self.estimates[number]),
                "cost": self._cost(self.estimates[number].rank_seconds),
            }
            for number, one in enumerate(self.film.shots)
        ]
        return {
            "title": self.film.board.title,
            "frames": length(self.film.parts),
            "auto": list(self.places),
            "shots": shots,
            "to_do": {
                "shots": len(self.missing),
                "replicas": self.replicas,
                "seconds": self.seconds,
                "rank_seconds": self.rank_seconds,
                "cost": self._cost(self.rank_seconds),
                "never_timed": sum(one.seconds is None for one in self.todo),
            },
        }

    def _cost(self, rank_seconds: float | None) -> float | None:
        return None if self.price is None or rank_seconds is None else rank_seconds / _HOUR * self.price


def estimate_all(film: Film, replicas: int = 1, price: float | None = None, gpu: Gpu | None = None) -> DryRun:
    """Estimate all shots of a film.

    Args:
        replicas: number of shots made at a time.
        price: price of one rank for an hour, in any currency.
        gpu: GPU on which steps that were never timed are rehearsed.
    """
    estimates = _Estimates(film, gpu)
    found = [estimates.of(number) for number in range(len(film.shots))]
    name = "" if gpu is None else gpu.name
    return DryRun(film, found, film.missing, replicas, price, name, [*estimates.places])


def dry_run_table(found: DryRun) -> Table:
    """Make the table of `--dry-run`: shots, their expected cost, and which are done."""
    film, price = found.film, found.price
    shots = counted(len(film.shots), "shot")
    table = Table(
        title=f"{film.board.title}: {shots}, {length(film.parts)} frames",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    priced = [] if price is None else ["cost"]
    for column in ("shot", "frames", "windows", "NFE", "denoising, s", "rank seconds", *priced, ""):
        words = column in ("shot", "")
        table.add_column(
            column, justify="left" if words else "right", no_wrap=column != "shot", overflow="fold"
        )
    for number, one in enumerate(film.shots[:_ROWS]):
        expected = found.estimates[number]
        table.add_row(
            one.shot.id,
            str(one.request.frames),
            str(one.windows),
            str(expected.nfe),
            *_amounts(expected.seconds, expected.rank_seconds, price),
            found.state(number),
        )
    if len(film.shots) > _ROWS:
        table.add_row("…", *[""] * (len(table.columns) - 2), f"{len(film.shots) - _ROWS} more")
    amounts = _amounts(found.seconds, found.rank_seconds, price)
    names = (f"s of denoising on {counted(found.replicas, 'replica')}", "rank-seconds", "in cost")
    said = [f"{amount} {name}" for amount, name in zip(amounts, names, strict=False)]
    if any(one.seconds is None for one in found.todo):
        said.append("plus shots whose time is not known")
    said += [f"preset {told}" for told in found.presets]
    if performs := {text for one in film.shots if (text := one.settings.performs.text) != "exact"}:
        said.append(f"performance {', '.join(sorted(performs))}")
    if found.gpu:
        said.append(f"shots without a report are estimated by a rehearsal on {found.gpu}")
    if found.places:
        said.append(f"memory options that are auto: {', '.join(found.places)}")
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
