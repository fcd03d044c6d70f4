"""A calibration as a job: its requests, its file, and the checks of both. `Calibrator` measures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.engine import Engine
from runtime.errors import BadRequestError
from runtime.files.atomic import is_in_the_way
from runtime.files.checks import check_apart, check_suffix, check_writable
from runtime.files.kinds import CALIBRATION
from runtime.files.locks import hold
from runtime.forecasting.calibration import Calibration, load_calibration
from runtime.measure.calibrate import Calibrator
from runtime.measure.findings import check_partial
from runtime.measure.session import OnRunStep
from runtime.measure.states import check_states, states_beside
from runtime.request.config import Config, is_embedded, shipped
from runtime.request.images import check_image
from runtime.request.video_request import VideoRequest
from runtime.sampling.denoise import StepRecord

SEED = 1000  # of the first video
_CONDITIONS = ("steps", "guidance", "guidance_2", "width", "height", "frames")


def _unseen(name: str, record: StepRecord) -> None:
    """Show no progress."""


@dataclass(frozen=True, slots=True)
class CalibrationJob:
    """What to calibrate, and the file to write, checked as far as is possible before the model loads.

    Attributes:
        requests: the videos, which may differ only in prompt and seed.
        out: the JSON file.
        budgets: numbers of computed steps for which solvers are fitted; usual ones by default.
        overwrite: whether another file may be replaced.
        added_to: the calibration in `out` that solvers are added to, if nothing else is to be measured.
    """

    config: Config
    requests: list[VideoRequest]
    out: Path
    budgets: tuple[int, ...] | None = None
    overwrite: bool = False
    added_to: Calibration | None = None

    @property
    def partial(self) -> Path:
        """File that keeps finished runs until the calibration is done."""
        return self.out.with_name(self.out.name + ".partial")

    @classmethod
    def of_prompts(
        cls,
        config: Config,
        prompts: Sequence[str],
        out: Path,
        *,
        seed: int = SEED,
        budgets: tuple[int, ...] | None = None,
        overwrite: bool = False,
        **given: Any,
    ) -> CalibrationJob:
        """Make a job with a video of each prompt.

        Args:
            seed: seed of the first video; each further video takes the next one.
            given: other fields of the requests.

        Raises:
            BadRequestError: a field is not acceptable.
        """
        requests = [
            config.request(prompt, **{**given, "seed": seed + number, "spectrum": "off"})
            for number, prompt in enumerate(prompts)
        ]
        return cls(config, requests, out, budgets, overwrite)

    @classmethod
    def of_calibration(
        cls, config: Config, out: Path, *, budgets: tuple[int, ...] | None = None, **given: Any
    ) -> CalibrationJob:
        """Make a job that adds solvers to the calibration in a file, from the same prompts and seeds.

        Args:
            given: other fields of the requests; steps, guidance and size are those of the calibration.

        Raises:
            BadRequestError: there is no calibration, or a field is not acceptable.
        """
        check_suffix(out, ".json", field="out")
        known = load_calibration(str(out))
        if len(known.prompts) != len(known.seeds):
            raise BadRequestError(
                f"out: {str(out)!r} given; it has {len(known.prompts)} prompts and {len(known.seeds)} seeds, "
                "where each video has one of both"
            )
        fields = {name: getattr(known.conditions, name) for name in _CONDITIONS}
        fields = {name: value for name, value in fields.items() if value is not None}
        requests = [
            config.request(prompt, **{**fields, **given, "seed": seed, "spectrum": "off"})
            for prompt, seed in zip(known.prompts, known.seeds, strict=True)
        ]
        return cls(config, requests, out, budgets, added_to=known)

    def check(self, inputs: Mapping[Path, str], *, is_leader: bool = True) -> None:
        """Check everything that can be checked before the model loads.

        Args:
            inputs: files to read, which must not be replaced → the option that names each.
            is_leader: whether this rank writes the file.

        Raises:
            BadRequestError: a request or the file is not acceptable.
        """
        check_suffix(self.out, ".json", field="out")
        check_apart({self.out: "out"}, inputs)
        if is_leader:
            check_writable(self.out, overwrite=self._replaces, kind=CALIBRATION)
            check_image(self.requests[0].image)
            check_partial(self.partial)
            check_states(states_beside(self.partial))

    def calibrator(self, engine: Engine, on_step: OnRunStep = _unseen) -> Calibrator:
        """Make what measures a loaded model for this job.

        Raises:
            BadRequestError: no calibration can be made of this model and these requests.
        """
        return Calibrator(
            engine,
            self.requests,
            self.partial,
            on_step,
            fitted=self.budgets,
            added_to=self.added_to,
            overwrite=self.overwrite,
        )

    def run(self, calibrator: Calibrator, engine: Engine) -> Calibration:
        """Measure what is left to do, on every rank, and write the file on the first.

        Raises:
            BadRequestError: another calibration makes the same file, or has since this job was made.
            CancelledError, JobFailedError, RankFailedError: see `Calibrator.run`.
        """
        held = self.alone() if engine.ranks.is_leader else nullcontext()
        with held, engine.commanded():
            if engine.ranks.is_leader:
                self._check_unchanged()
            calibration = calibrator.run()
            if engine.ranks.is_leader:
                calibration.write(self.out, overwrite=self._replaces)
            calibrator.forget()
        return calibration

    def advice(self) -> str:
        """Return how to resume after an interruption; empty if nothing was kept."""
        if not self.partial.is_file():
            return ""
        taken = is_in_the_way(self.out, overwrite=self._replaces)
        first = f"move {str(self.out)!r} elsewhere; then " if taken else ""
        return f"{first}the same command resumes from {str(self.partial)!r}"

    def _check_unchanged(self) -> None:
        """Refuse to add to a calibration that was replaced while the model loaded: that one would be lost."""
        if self.added_to is not None and load_calibration(str(self.out)) != self.added_to:
            raise BadRequestError(
                f"out: another calibration wrote {str(self.out)!r} meanwhile; run the same command again"
            )

    @property
    def _replaces(self) -> bool:
        return self.overwrite or self.added_to is not None

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


def shipped_prompts(config: Config) -> Path:
    """Path of the shipped file of prompts: the embedded models understand those of one kind alone."""
    return shipped("prompts", "shapes.txt" if is_embedded(config.model) else "general.txt")
