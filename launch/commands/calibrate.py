"""`lockstep calibrate`: measures a model on some prompts and writes a calibration file, on one rank or many.

One rank under torchrun: `torchrun --nproc-per-node N -m launch.commands.calibrate --out FILE.json …`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from launch.commands.build_job import build_request, given_only, inputs_of
from launch.commands.command import Command, verbosity_options
from launch.commands.options import calibrate_options
from launch.shell.exits import advising
from launch.shell.logs import set_up_logging
from launch.shell.progress import timed
from launch.shell.terminal import Terminal, counted, print_path
from runtime.engine import Engine
from runtime.errors import BadRequestError
from runtime.forecasting.calibration import Calibration
from runtime.jobs.defaults import usual_timeout
from runtime.measure.calibrate import Calibrator
from runtime.measure.calibration_job import CalibrationJob, shipped_prompts
from runtime.models.configs import open_config
from runtime.parallel.meeting import Rendezvous
from runtime.parallel.ranks import Ranks
from runtime.profile import check_loras
from runtime.request.config import Config
from runtime.request.prompts import read_prompts
from runtime.request.video_request import VideoRequest
from runtime.sampling.denoise import StepRecord
from spectrum import StepKind


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
    add_solvers: bool = False,
    is_leader: bool = True,
    **given: Any,
) -> CalibrationJob:
    """Build a calibration job from options, checking everything that can be checked before the model loads.

    Args:
        prompts: a file with one prompt per line; by default the one shipped for such models.
        seed: seed of the first video; each further video takes the next one.
        budgets: numbers of computed steps for which solvers are fitted; usual ones by default.
        add_solvers: whether to add solvers to the calibration in `out`, from its prompts and seeds.
        is_leader: whether this rank writes the file.

    Raises:
        BadRequestError: an option is not acceptable.
    """
    settings = open_config(config, model=model, revision=revision)
    check_loras(settings)
    inputs: dict[Path, str] = {}
    if add_solvers:
        for name, wrong in {"prompts": prompts is not None, "overwrite": overwrite}.items():
            if wrong:
                said = "which changes the calibration in --out"
                raise BadRequestError(f"{name}: given with --add-solvers, {said}")
        job = CalibrationJob.of_calibration(settings, out, budgets=budgets, **given_only(given))
    else:
        path = prompts or shipped_prompts(settings)
        inputs[path] = "prompts"
        job = CalibrationJob(settings, _requests(settings, path, seed, **given), out, budgets, overwrite)
    job.check(inputs_of(config, settings, job.requests[0]) | inputs, is_leader=is_leader)
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
    calibrator = job.calibrator(engine, shown)
    console.print(_cost(job, calibrator), soft_wrap=True)
    with advising(job.advice), shown.of(calibrator):
        return job.run(calibrator, engine)


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


@click.command(cls=Command)
@calibrate_options
@verbosity_options
def rank(verbose: bool, quiet: bool, ranks: int | None, timeout: float | None, **options: Any) -> None:
    """Make a calibration as one rank of the group that torchrun started."""
    from launch.shell.rank import check_world, joined, told_to_others
    from launch.shell.signals import stop_on_signals

    rendezvous = Rendezvous.from_environment()
    set_up_logging(Terminal(stderr=True), verbose=verbose, rank=rendezvous.rank)
    with told_to_others(rendezvous):
        check_world(ranks, rendezvous)
        job = plan_calibration(**options, is_leader=rendezvous.rank == 0)
    console = Terminal(stderr=True, quiet=quiet or rendezvous.rank != 0)
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
        self._calibrator: Calibrator | None = None

    def of(self, calibrator: Calibrator) -> Progress:
        """Say what is shown: the total number of evaluations is known better and better."""
        self._calibrator = calibrator
        return self

    def start(self) -> None:
        if self.console.is_terminal:
            super().start()

    def __call__(self, name: str, record: StepRecord) -> None:
        total = None if self._calibrator is None else self._calibrator.evaluations
        self.update(self._task, description=name, total=total, advance=record.kind is StepKind.COMPUTE)
        if name != self._name and not self.console.is_terminal:
            self.console.print(name)
        self._name = name


if __name__ == "__main__":
    from launch.shell.rank import end_rank

    end_rank(rank, "python -m launch.commands.calibrate")
