"""`lockstep calibrate`: measures a model on some prompts and writes a calibration file, on one rank or many.

One rank under torchrun: `torchrun --nproc-per-node N -m launch.commands.calibrate --out FILE.json …`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from launch.commands.build_job import build_request, inputs_of
from launch.commands.options import calibrate_options
from launch.commands.prompts import read_prompts
from launch.shell.exits import advising
from launch.shell.logs import set_up_logging
from launch.shell.progress import timed
from launch.shell.terminal import Terminal, counted, print_path
from runtime.engine import Engine
from runtime.errors import BadRequestError
from runtime.files.atomic import is_in_the_way
from runtime.files.checks import check_apart, check_suffix, check_writable
from runtime.files.kinds import CALIBRATION
from runtime.files.locks import hold
from runtime.forecasting.calibration import Calibration
from runtime.jobs.defaults import usual_timeout
from runtime.measure.calibrate import Calibrator
from runtime.measure.findings import check_partial
from runtime.measure.states import check_states, states_beside
from runtime.models.configs import open_config
from runtime.parallel.meeting import Rendezvous
from runtime.parallel.ranks import Ranks
from runtime.profile import check_loras
from runtime.request.config import DEFAULT, Config, shipped
from runtime.request.images import check_image
from runtime.request.video_request import VideoRequest
from runtime.sampling.denoise import StepRecord
from spectrum import StepKind


@dataclass(frozen=True, slots=True)
class CalibrationJob:
    """Options of a calibration, checked as far as possible before the model loads."""

    config: Config
    requests: list[VideoRequest]
    out: Path
    budgets: tuple[int, ...] | None = None
    overwrite: bool = False

    @property
    def partial(self) -> Path:
        """File that keeps finished runs until the calibration is done."""
        return self.out.with_name(self.out.name + ".partial")

    def advice(self) -> str:
        """Return how to resume after an interruption; empty if nothing was kept."""
        if not self.partial.is_file():
            return ""
        taken = is_in_the_way(self.out, overwrite=self.overwrite)
        first = f"move {str(self.out)!r} elsewhere; then " if taken else ""
        return f"{first}the same command resumes from {str(self.partial)!r}"

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Let no other calibration make the same file meanwhile: each would undo the other's finished runs.

        Raises:
            BadRequestError: another one does, or a file has the lock's name.
        """
        path = self.out.with_name(f"{self.out.name}.lock")
        try:
            lock = hold(
                path,
                field="out",
                said=lambda who: (
                    f"out: {str(self.out)!r} is being made by another calibration ({who}); "
                    "wait for it, or give another name"
                ),
            )
        except OSError:  # a file system without locks
            lock = None
        try:
            yield
        finally:
            if lock is not None:
                path.unlink(missing_ok=True)
                lock.close()


def plan_calibration(
    config: str | None,
    *,
    model: str | None = None,
    revision: str | None = None,
    prompts: Path | None,
    seed: int,
    out: Path,
    overwrite: bool,
    budgets: tuple[int, ...] | None = None,
    is_leader: bool = True,
    **given: Any,
) -> CalibrationJob:
    """Build a calibration job from options, checking everything that can be checked before the model loads.

    Args:
        prompts: a file with one prompt per line; by default the one shipped for the config.
        seed: seed of the first video; each further video takes the next one.
        budgets: numbers of computed steps for which solvers are fitted; usual ones by default.
        is_leader: whether this rank writes the file.

    Raises:
        BadRequestError: an option is not acceptable.
    """
    settings = open_config(config, model=model, revision=revision)
    check_loras(settings)
    check_suffix(out, ".json", field="out")
    path = prompts or _shipped_prompts(config or (DEFAULT if model is None else ""))
    requests = _requests(settings, path, seed, **given)
    check_apart({out: "out"}, inputs_of(config, settings, requests[0]) | {path: "prompts"})
    if is_leader:
        check_writable(out, overwrite=overwrite, kind=CALIBRATION)
    job = CalibrationJob(settings, requests, out, budgets, overwrite)
    if is_leader:
        check_image(requests[0].image)
        check_partial(job.partial)
        check_states(states_beside(job.partial))
    return job


def _requests(config: Config, prompts: Path, seed: int, **given: Any) -> list[VideoRequest]:
    """Build one request for each prompt of a file."""
    lines = read_prompts(prompts)
    build_request(
        config, "any", seed=seed, spectrum="off", **given
    )  # report once what is wrong for all prompts
    requests = []
    for number, (line, prompt) in enumerate(lines.items()):
        try:
            requests.append(build_request(config, prompt, seed=seed + number, spectrum="off", **given))
        except BadRequestError as error:
            raise BadRequestError(f"prompts: {str(prompts)!r}, line {line}: {error}") from None
    return requests


def run_calibration(
    job: CalibrationJob,
    console: Console,
    ranks: Ranks | None = None,
    engine: Engine | None = None,
    on_loaded: Callable[[Engine], None] = lambda _: None,
) -> Calibration:
    """Make the calibration and, on the first rank, write it.

    Args:
        engine: an engine already loaded on `ranks`; by default one is loaded.
        on_loaded: called with the engine before the runs start, so that commands can be sent to it.
    """
    if engine is None:
        with timed(console, f"loading {job.config.model}"):
            engine = Engine(job.config, ranks)
    on_loaded(engine)
    shown = _Shown(console)
    calibrator = Calibrator(
        engine, job.requests, job.partial, shown, fitted=job.budgets, overwrite=job.overwrite
    )
    console.print(_cost(job, calibrator), soft_wrap=True)
    held = job.alone() if engine.ranks.is_leader else nullcontext()
    with held, advising(job.advice), engine.commanded(), shown.of(calibrator.evaluations):
        calibration = calibrator.run()
        if engine.ranks.is_leader:
            calibration.write(job.out, overwrite=job.overwrite)
        calibrator.forget()
    return calibration


def _cost(job: CalibrationJob, calibrator: Calibrator) -> str:
    """Say what a calibration takes."""
    solvers = ", ".join(str(nfe) for nfe in calibrator.fitted)
    fitted = f", solvers of {solvers} steps" if solvers else ""
    room = f"; up to {calibrator.disk / 1e9:.2g} GB beside the result until it is done" if solvers else ""
    cost = calibrator.evaluations
    return (
        f"{counted(len(job.requests), 'video')}{fitted}; about {cost} evaluations, as many as "
        f"{cost / job.requests[0].steps:.0f} full runs{room}"
    )


def _shipped_prompts(config: str) -> Path:
    """Return the shipped file of prompts for a config, or the general one; that if it has no name."""
    own = shipped("prompts", f"{Path(config).stem}.txt")
    return own if own.is_file() else shipped("prompts", "general.txt")


@click.command()
@calibrate_options
@click.option("-v", "--verbose", is_flag=True, help="Log more to stderr.")
def rank(verbose: bool, ranks: int | None, timeout: float | None, **options: Any) -> None:
    """Make a calibration as one rank of the group that torchrun started."""
    from launch.shell.rank import check_world, joined, told_to_others
    from launch.shell.signals import stop_on_signals

    rendezvous = Rendezvous.from_environment()
    set_up_logging(Terminal(stderr=True), verbose=verbose, rank=rendezvous.rank)
    with told_to_others(rendezvous):
        check_world(ranks, rendezvous)
        job = plan_calibration(**options, is_leader=rendezvous.rank == 0)
    console = Terminal(stderr=True, quiet=rendezvous.rank != 0)
    with joined(job.config, rendezvous, timeout or usual_timeout(job.config.performs.compile)) as group:
        run_calibration(job, console, group, on_loaded=stop_on_signals)
    if rendezvous.rank == 0:
        print_path(job.out)


class _Shown(Progress):
    """Shows runs and evaluations: a bar on a terminal, one line per run in a log."""

    def __init__(self, console: Console):
        super().__init__(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=32),
            TimeRemainingColumn(),
            console=console,
        )
        self._name = ""
        self._task = self.add_task("")

    def of(self, evaluations: int) -> Progress:
        """Set the total number of evaluations."""
        self.update(self._task, total=evaluations)
        return self

    def start(self) -> None:
        if self.console.is_terminal:
            super().start()

    def __call__(self, name: str, record: StepRecord) -> None:
        self.update(self._task, description=name, advance=record.kind is StepKind.COMPUTE)
        if name != self._name and not self.console.is_terminal:
            self.console.print(name)
        self._name = name


if __name__ == "__main__":
    from launch.shell.rank import end_rank

    end_rank(rank, "python -m launch.commands.calibrate")
