"""Making a calibration: full runs, nudged runs, trials of planned schedules, and fitted solvers.

1. Every video is made once by the full sampler, and the Gram matrices of its streams are summed over the
   ranks' shards, in one reduction per video. A step's stream is remembered until the run ends, sampled to at
   most 2²³ numbers per branch and rank, so that memory is bounded for any model. The Gram matrix of that many
   numbers is known far more precisely than videos differ, and nothing is spilled or computed twice.
2. Some of the videos are run again from a few steps on, with the velocity of that step nudged along its own
   change, as a forecast would be off. The part of the nudge left at the end is the step's sensitivity, and
   what it does to the next velocity the response.
3. Every video is made again with schedules planned from all the others, to relate expected to actual errors.
4. Solvers are fitted for some numbers of computed steps; see `runtime.measure.solvers`. The states that they
   are fitted to lie on the first rank's disk, beside the result.

Where solvers are added to a calibration, its videos are made once more by the full sampler, for their states,
and only the last stage follows.

Each finished run is kept in a file beside the result, and is not repeated after an interruption.

Legend: n sampler steps.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from runtime.engine import Engine
from runtime.errors import BadRequestError
from runtime.forecasting.calibration import Calibration
from runtime.forecasting.fits import Fit
from runtime.forecasting.parts import FullSchedulePart
from runtime.forecasting.presets import Preset, Switch
from runtime.forecasting.trials import Trial
from runtime.measure.findings import PartialFile
from runtime.measure.fit_budgets import PASSES, BudgetFitting
from runtime.measure.full_runs import FullRuns
from runtime.measure.session import OnRunStep, Session
from runtime.measure.solvers import SolverFitting
from runtime.measure.states import StateFiles, states_beside
from runtime.media.quality import psnr
from runtime.request.images import image_digest
from runtime.request.video_request import VideoRequest
from runtime.sampling.streams import GuidedStream
from runtime.versions import versions
from spectrum import MAX_STEPS, FixedSchedule, StepKind, surprise
from spectrum.calibration import LEAST_STEPS, LEAST_VIDEOS, Findings, trial_budgets

_FITTED = (0.16, 0.2, 0.28)  # the same, of solvers
# Plans of outputs are for one history of all experts, whose Gram matrix says what crosses a switch; solvers
# have no history that could be dropped.
_CARRIED = Preset(stream="guided", schedule=FullSchedulePart(kind="full"), switch=Switch(history="carried"))


class Calibrator:
    """Makes one calibration, as one rank of the engine's group.

    Args:
        engine: the model, with the sampler to calibrate for.
        requests: the videos, which may differ only in prompt and seed.
        partial: file that keeps finished runs until all are done; only the first rank uses it.
        on_step: shows progress.
        fitted: numbers of computed steps for which solvers are fitted; a few usual ones by default.
        added_to: calibration of the same videos that the solvers are added to; by default all is measured.
        overwrite: whether finished runs of another calibration in `partial` may be replaced.

    Attributes:
        fitted: numbers of computed steps of the solvers, ascending.

    Raises:
        BadRequestError: no calibration can be made from the requests.
    """

    def __init__(
        self,
        engine: Engine,
        requests: Sequence[VideoRequest],
        partial: Path,
        on_step: OnRunStep = lambda _name, _record: None,
        *,
        fitted: Collection[int] | None = None,
        added_to: Calibration | None = None,
        overwrite: bool = False,
    ):
        self._engine, self._overwrite, self._added_to = engine, overwrite, added_to
        self._requests = [request.full for request in requests]
        check_requests(self._requests)
        self._session = Session(engine, self._requests, on_step)
        self._plan = self._session.plan
        self._steps = self._plan.steps
        if len(self._plan.windows) > 1:
            raise BadRequestError(
                f"frames: {self._requests[0].frames} given; calibrate with the length of one window, "
                f"{engine.config.windowed(self._requests[0]).frames}"
            )
        if self._steps > MAX_STEPS or self._steps < LEAST_STEPS:
            raise BadRequestError(
                f"steps: {self._steps} given; calibrations have {LEAST_STEPS} to {MAX_STEPS} steps"
            )
        sampler = self._plan.fresh_sampler()
        self._conditions = engine.profile.conditions(self._requests[0], sampler)
        self._levels = [float(level) for level in sampler.sigmas]
        if len(self._levels) != self._steps + 1:
            raise BadRequestError(f"config: {type(sampler).__name__} has no noise level for each step")
        self.fitted = self._checked(fitted)
        self._passes: dict[int, int] = {}  # of the solvers whose nodes are planned
        if added_to is not None:
            self._check_addition(added_to)
        self._found = Findings()
        self._kept: PartialFile | None = None  # on the first rank
        identity = self._identity if engine.ranks.is_leader else ""
        if engine.ranks.is_leader:
            self._kept = PartialFile(partial, identity, self._steps, self._session.shape)
        self._states = StateFiles(states_beside(partial), identity, self._session.shape, self._steps)
        self._full_runs = FullRuns(self._session, self._levels, self._states if self.fitted else None)

    def _checked(self, fitted: Collection[int] | None) -> list[int]:
        if fitted is None:
            return sorted({max(2, round(share * self._steps)) for share in _FITTED})
        least = len(set(self._plan.course.numbers))  # a node for each expert
        if wrong := [nfe for nfe in sorted(fitted) if not least <= nfe < self._steps]:
            said = f"solvers of {self._steps} steps compute {least} to {self._steps - 1} of them"
            raise BadRequestError(f"budgets: {wrong[0]} given; {said}")
        return sorted(set(fitted))

    def _check_addition(self, calibration: Calibration) -> None:
        """Refuse to add solvers to a calibration of something else, or solvers that it has."""
        calibration.conditions.check_fit(self._conditions, "that solvers are added to")
        if not self.fitted:
            raise BadRequestError("budgets: none given, but solvers are to be added to a calibration")
        there = {fit.nfe for fit in calibration.fits}
        if twice := sorted(there & {*self.fitted}):
            nfe = twice[0]
            raise BadRequestError(f"budgets: {nfe} given; the calibration has a solver of {nfe} steps")

    @property
    def budgets(self) -> list[int]:
        """Numbers of computed steps of the trials."""
        return trial_budgets(self._steps)

    @property
    def evaluations(self) -> int:
        """Number of computed steps of the whole calibration; fewer once nodes prove to be the same."""
        videos = len(self._requests)
        passes = {nfe: self._passes.get(nfe, PASSES) for nfe in self.fitted}
        fitted = sum(count * (nfe - 1) for nfe, count in passes.items()) + bool(self.fitted)
        if self._added_to is not None:
            return videos * (self._steps + fitted)
        nudged = sum(
            self._steps - step for video in range(videos) for step in self._full_runs.nudged_steps(video)
        )
        return videos * (self._steps + sum(self.budgets) + fitted) + nudged

    @property
    def disk(self) -> int:
        """Bytes that the states of full runs and the values of a fit take on the first rank's disk."""
        if not self.fitted:
            return 0
        values = 2 * self.fitted[-1] * math.prod(self._session.shape) * 4
        return len(self._requests) * (self._states.size + values)

    def run(self) -> Calibration:
        """Make everything that is left to do. Finished runs are kept until `forget`.

        Raises:
            CancelledError: the calibration was stopped or cancelled, within `Engine.commanded`.
            JobFailedError: the disk is full.
            RankFailedError: another rank failed.
        """
        self._resume()
        for video in range(len(self._found.grams), len(self._requests)):
            self._full(video)
            self._keep()
        if self._added_to is not None:
            self._fit_all()
            return self._added(self._added_to)
        for video in range(len(self._found.trials) // len(self.budgets), len(self._requests)):
            self._try(video)
            self._keep()
        self._fit_all()
        return self._finish()

    def forget(self) -> None:
        """Remove the files of finished runs, after the calibration was written."""
        if self._kept is not None:
            self._kept.remove()
            self._states.remove()

    def _full(self, video: int) -> None:
        """Make one full run, and the nudged runs that branch off it; only the full run if that suffices."""
        if self._added_to is not None:
            self._full_runs.repeat(video, self._found, self._added_to.measured)
        else:
            self._full_runs.make(video, self._found)

    def _try(self, video: int) -> None:
        """Make one video with schedules for several budgets, planned from all the other videos."""
        session = self._session
        predictor, planner = self._found.without(video, self._levels)
        run = session.prepare(video, _CARRIED)
        truth = session.frames(session.share(self._found.latents, video))
        done: list[Trial] = []
        for nfe in self.budgets:
            plan = planner.plan(nfe)
            name = f"trial {video + 1} of {len(self._requests)} with {nfe} steps"
            schedule = FixedSchedule(plan.steps, plan.computed)
            state = session.denoising(run, GuidedStream(run.network, predictor), name, schedule)
            for record in session.walk(state, name):
                if record.kind is StepKind.FORECAST:
                    self._found.forecast.append(record.seconds)
            frames = session.frames(state.latents_BCFHW)
            if session.ranks.is_leader:
                full_BCFHW = self._found.latents[video].to(state.latents_BCFHW)
                difference = (state.latents_BCFHW - full_BCFHW).norm() / full_BCFHW.norm()
                done.append(
                    Trial(
                        video=video,
                        nfe=nfe,
                        expected=plan.error,
                        surprise=surprise(state.coordinator.errors, plan.expected),
                        measured=float(difference),
                        psnr=psnr(frames, truth),
                    )
                )
        self._found.trials += session.tell([trial.model_dump() for trial in done])

    def _fit_all(self) -> None:
        """Fit the solvers that are left to do; states that are not there any more are made again."""
        self._passes.update({len(fit["nodes"]): fit["passes"] for fit in self._found.fits})
        missing = [nfe for nfe in self.fitted if nfe not in self._passes]
        if not missing:
            return
        runs = [self._session.prepare(video, _CARRIED) for video in range(len(self._requests))]
        there = [self._states.has(video) for video in range(len(runs))]
        for video, is_there in enumerate(self._session.tell(there)):
            if not is_there:
                self._full_runs.restore_states(video, runs[video])
        fitting = SolverFitting(self._session, runs, self._states)
        budgets = BudgetFitting(self._session, fitting, self._found, self._keep, self._passes)
        for nfe in missing:
            budgets.fit(nfe)

    def _added(self, calibration: Calibration) -> Calibration:
        """The calibration with the new solvers."""
        fits = [Fit.model_validate(fit) for fit in self._found.fits if len(fit["nodes"]) in self.fitted]
        all_fits = sorted([*calibration.fits, *fits], key=lambda fit: fit.nfe)
        return calibration.model_copy(update={"fits": all_fits, "versions": versions()})

    def _finish(self) -> Calibration:
        conditions = self._conditions.model_dump()
        content = self._found.content(conditions, self._levels, self._engine.ranks.size)
        content["fits"] = [fit for fit in content["fits"] if len(fit["nodes"]) in self.fitted]
        return Calibration.model_validate(
            content
            | {
                "prompts": [request.prompt for request in self._requests],
                "seeds": [request.seed for request in self._requests],
                "versions": versions(),
            }
        )

    @property
    def _identity(self) -> str:
        """Digest of the recipes of all runs; on the first rank only, which has the image."""
        image = self._requests[0].image
        digest = None if image is None else image_digest(image)
        profile, preset = self._engine.profile, self._plan.preset
        recipes = [profile.recipe(request, preset, digest).latents.digest for request in self._requests]
        before = [] if self._added_to is None else [self._added_to.digest]
        return hashlib.sha256(json.dumps([*recipes, *before]).encode()).hexdigest()

    def _keep(self) -> None:
        if self._kept is not None:
            self._kept.write(self._found)

    def _resume(self) -> None:
        """Resume from the finished runs of an interrupted calibration."""
        found, problem = None, ""
        if self._kept is not None:
            try:
                found = self._kept.read()
            except BadRequestError as error:
                if not self._overwrite:
                    problem = str(error)
        told: dict[str, Any] | None
        problem, told = self._engine.ranks.control.all_gather_object((problem, found and found.plain()))[0]
        if problem:
            raise BadRequestError(problem)
        if told is not None:
            self._found = Findings(**told, latents=found.latents if found else [])


def check_requests(requests: Sequence[VideoRequest]) -> None:
    """Refuse requests from which no calibration can be made.

    Raises:
        BadRequestError: there are too few videos, or they differ in more than prompt and seed.
    """
    if len(requests) < LEAST_VIDEOS:
        raise BadRequestError(
            f"prompts: {len(requests)} given; a calibration needs at least {LEAST_VIDEOS}, "
            "preferably 8 or more"
        )
    alike = {r.model_copy(update={"prompt": "", "seed": 0}).model_dump_json() for r in requests}
    if len(alike) > 1:
        raise BadRequestError("prompts: the videos of a calibration may differ only in prompt and seed")
