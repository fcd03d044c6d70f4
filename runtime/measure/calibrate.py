"""Making a calibration: full runs, nudged runs, and trials of planned schedules.

1. Every video is made once by the full sampler, and the Gram matrices of its streams are summed over the
   ranks' shards, in one reduction per video. A step's stream is remembered until the run ends, sampled to at
   most 2²³ numbers per branch and rank, so that memory is bounded for any model. The Gram matrix of that many
   numbers is known far more precisely than videos differ, and nothing is spilled or computed twice.
2. Some of the videos are run again from a few steps on, with the velocity of that step nudged along its own
   change, as a forecast would be off. The part of the nudge left at the end is the step's sensitivity.
3. Every video is made again with schedules planned from all the others, to relate expected to actual errors.

Each finished run is kept in a file beside the result, and is not repeated after an interruption.

Tensor legend: n sampler steps; C, F, H, W latent channels, frames, height and width.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import SchedulerMixin

from runtime.engine import Engine
from runtime.errors import BadRequestError
from runtime.forecasting.calibration import (
    Calibration,
    StreamName,
    from_triangle,
    make_planner,
    to_triangle,
)
from runtime.forecasting.trials import Trial
from runtime.measure.findings import Findings, PartialFile
from runtime.measure.probes import GramStream, NudgedStream, sample
from runtime.media.mp4 import FrameBuffer, Frames
from runtime.media.quality import psnr
from runtime.request.images import image_digest
from runtime.request.video_request import VideoRequest
from runtime.sampling.coordinator import Coordinator
from runtime.sampling.denoise import Denoising, StepRecord, denoise
from runtime.sampling.result import Result
from runtime.sampling.run import Run
from runtime.sampling.streams import GuidedStream, Stream
from runtime.versions import versions
from spectrum import (
    MAX_STEPS,
    CalibratedPredictor,
    FixedSchedule,
    Gram,
    Schedule,
    StepKind,
    StepSeconds,
    mean_gram,
    surprise,
)

_NUDGED_EARLY = (0.02, 0.06, 0.12, 0.25)  # fractions of the last step; sensitivities vary much here,
_NUDGED_LATE = (0.45, 0.72, 1.0)  # and little here
_EVERY, _LATE_VIDEOS = 2, 3  # every second video is nudged early, and three of them late, too
_NUDGE = 0.5  # size, relative to the velocity's change since the step before
_TRIALS = (0.16, 0.2, 0.28, 0.4)  # computed steps, as fractions of all

OnRunStep = Callable[[str, StepRecord], None]
"""Called with the name of the run and the record of each of its steps."""


@dataclass(frozen=True, slots=True)
class _Before:
    """State of a full run just before one of its steps."""

    step: int
    latents_BCFHW: torch.Tensor
    sampler: SchedulerMixin
    velocity_BCFHW: torch.Tensor  # velocity of the step before


class Calibrator:
    """Makes one calibration, as one rank of the engine's group.

    Args:
        engine: the model, with the sampler to calibrate for.
        requests: the videos, which may differ only in prompt and seed.
        partial: file that keeps finished runs until all are done; only the first rank uses it.
        on_step: shows progress.
        overwrite: whether finished runs of another calibration in `partial` may be replaced.

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
        overwrite: bool = False,
    ):
        self._engine, self._on_step, self._overwrite = engine, on_step, overwrite
        self._requests = [request.full for request in requests]
        check_requests(self._requests)
        self._plan = engine.plan(self._requests[0])
        self._steps = self._plan.steps
        if len(self._plan.windows) > 1:
            raise BadRequestError(
                f"frames: {self._requests[0].frames} given; calibrate with the length of one window, "
                f"{engine.config.windowed(self._requests[0]).frames}"
            )
        if self._steps > MAX_STEPS or self._steps < 4:
            raise BadRequestError(f"steps: {self._steps} given; calibrations have 4 to {MAX_STEPS} steps")
        sampler = self._plan.fresh_sampler()
        self._conditions = engine.profile.conditions(self._requests[0], sampler)
        self._levels = [float(level) for level in sampler.sigmas]
        if len(self._levels) != self._steps + 1:
            raise BadRequestError(f"config: {type(sampler).__name__} has no noise level for each step")
        self._found = Findings()
        self._kept: PartialFile | None = None  # on the first rank
        if engine.ranks.is_leader:
            shape = engine.sizes.shape(self._requests[0])
            self._kept = PartialFile(partial, self._identity, self._steps, shape)

    def nudged_steps(self, video: int) -> list[int]:
        """Steps at which `video` is nudged."""
        if video % _EVERY:
            return []
        shares = _NUDGED_EARLY + (_NUDGED_LATE if video < _EVERY * _LATE_VIDEOS else ())
        return sorted({max(1, round(share * (self._steps - 1))) for share in shares})

    @property
    def budgets(self) -> list[int]:
        """Numbers of computed steps of the trials."""
        return sorted({max(2, round(share * self._steps)) for share in _TRIALS})

    @property
    def evaluations(self) -> int:
        """Number of computed steps of the whole calibration."""
        videos = len(self._requests)
        nudged = sum(self._steps - step for video in range(videos) for step in self.nudged_steps(video))
        return videos * self._steps + nudged + videos * sum(self.budgets)

    def run(self) -> Calibration:
        """Make everything that is left to do. Finished runs are kept until `forget`.

        Raises:
            CancelledError: the calibration was stopped or cancelled, within `Engine.commanded`.
            RankFailedError: another rank failed.
        """
        self._resume()
        for video in range(len(self._found.grams), len(self._requests)):
            self._full(video)
            self._keep()
        for video in range(len(self._found.trials) // len(self.budgets), len(self._requests)):
            self._try(video)
            self._keep()
        return self._finish()

    def forget(self) -> None:
        """Remove the file of finished runs, after the calibration was written."""
        if self._kept is not None:
            self._kept.remove()

    def _prepare(self, video: int) -> Run:
        """Prepare a run of one of the videos."""
        return self._engine.prepare(self._engine.plan(self._requests[video], self._plan.preset))

    def _full(self, video: int) -> None:
        """Make one full run, and the nudged runs that branch off it."""
        run = self._prepare(video)
        stream = GramStream(run.network, is_leader=self._engine.ranks.is_leader)
        nudged = self.nudged_steps(video)
        before: list[_Before] = []
        name = f"video {video + 1} of {len(self._requests)}"
        state = self._denoising(run, stream, name)
        for record in self._walk(state, name):
            self._found.computed.append(record.seconds)
            if record.index + 1 in nudged:
                assert stream.last_BCFHW is not None
                kept = state.latents_BCFHW.clone(), copy.deepcopy(state.sampler), stream.last_BCFHW
                before.append(_Before(record.index + 1, *kept))
        grams = self._sum(stream.grams())
        final_BCFHW = state.latents_BCFHW
        root = math.sqrt(float(np.trace(grams["guided"])) / self._steps)
        sampled = sample(final_BCFHW).double()
        gains: dict[str, float] = {}
        for one in before:
            gains[str(one.step)] = self._nudge(run, one, final_BCFHW, f"{name}, nudged at {one.step}")
        self._found.grams.append({stream: to_triangle(gram) for stream, gram in grams.items()})
        self._found.scales.append(root / float(sampled.norm()))
        self._found.latents.append(final_BCFHW.cpu())
        for step, gain in gains.items():
            self._found.gains.setdefault(step, []).append(gain)

    def _nudge(self, run: Run, before: _Before, final_BCFHW: torch.Tensor, name: str) -> float:
        """Size of an error of one step at the end, relative to its size in the latent after that step."""
        stream = NudgedStream(run.open_stream(), before.step, before.velocity_BCFHW, _NUDGE)
        state = self._denoising(run, stream, name)
        state.latents_BCFHW, state.sampler = before.latents_BCFHW, before.sampler
        for _ in self._walk(state, name, before.step):
            pass
        moved = abs(self._levels[before.step] - self._levels[before.step + 1])
        left = float((state.latents_BCFHW - final_BCFHW).double().norm())
        return left / max(moved * stream.size, 1e-30)

    def _try(self, video: int) -> None:
        """Make one video with schedules for several budgets, planned from all the other videos."""
        others = [grams for index, grams in enumerate(self._found.grams) if index != video]
        gram = mean_gram(from_triangle(grams["guided"], self._steps) for grams in others)
        predictor = CalibratedPredictor(gram)
        planner = make_planner(predictor, self._levels, self._sensitivity(), self._scale())
        run = self._prepare(video)
        truth = self._frames(self._full_latents(video))
        done: list[Trial] = []
        for nfe in self.budgets:
            plan = planner.plan(nfe)
            name = f"trial {video + 1} of {len(self._requests)} with {nfe} steps"
            schedule = FixedSchedule(plan.steps, plan.computed)
            state = self._denoising(run, GuidedStream(run.network, predictor), name, schedule)
            for record in self._walk(state, name):
                if record.kind is StepKind.FORECAST:
                    self._found.forecast.append(record.seconds)
            frames = self._frames(state.latents_BCFHW)
            if self._engine.ranks.is_leader:
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
        told = self._engine.ranks.control.all_gather_object([trial.model_dump() for trial in done])[0]
        self._found.trials += told

    def _denoising(self, run: Run, stream: Stream, name: str, schedule: Schedule | None = None) -> Denoising:
        """Begin to denoise a run by `stream`, on a schedule or by the full sampler."""
        course = run.plan.course
        coordinator = Coordinator(
            dict.fromkeys(run.plan.request.branches, schedule or FixedSchedule.full(self._steps)),
            name,
            self._engine.ranks,
            commands=self._engine.commands,
            course=course,
            forced=course.forced(outputs=True),
        )
        return Denoising(run.noise_BCFHW, run.plan.fresh_sampler(), stream, coordinator)

    def _walk(self, state: Denoising, name: str, start: int = 0) -> Iterator[StepRecord]:
        """Denoise to the end, yielding every step."""
        for record in denoise(state, self._engine.ranks, start):
            self._on_step(name, record)
            yield record

    def _full_latents(self, video: int) -> torch.Tensor:
        """Broadcast the final latents of a full run to every rank."""
        latents_BCFHW = torch.empty(
            self._engine.sizes.shape(self._requests[video]), device=self._engine.ranks.device
        )
        if self._engine.ranks.is_leader:
            latents_BCFHW.copy_(self._found.latents[video])
        self._engine.ranks.everyone.broadcast(latents_BCFHW)
        return latents_BCFHW

    def _frames(self, latents_BCFHW: torch.Tensor) -> Frames:
        """Decode the frames of all videos, `[T, H, W, 3]` on the first rank, empty on the others."""
        is_leader, plan = self._engine.ranks.is_leader, self._plan
        sinks = [FrameBuffer() for _ in range(latents_BCFHW.shape[0])] if is_leader else []
        self._engine.decode(latents_BCFHW, sinks, Result(plan))
        return np.concatenate([sink.frames for sink in sinks]) if sinks else np.empty((0, 0, 0, 3), np.uint8)

    def _sum(self, grams: dict[StreamName, Gram]) -> dict[StreamName, Gram]:
        """Sum Gram matrices over the ranks, in one reduction."""
        flat = np.concatenate([gram.ravel() for gram in grams.values()])
        summed = np.asarray(self._engine.ranks.control.sum(flat.tolist()))
        parts = np.split(summed, len(grams))
        return {name: part.reshape(self._steps, self._steps) for name, part in zip(grams, parts, strict=True)}

    def _sensitivity(self) -> list[float]:
        """Sensitivity of every step: root mean square of the gains, interpolated in the logarithm."""
        steps = sorted(int(step) for step in self._found.gains)
        sizes = [math.sqrt(statistics.fmean(g * g for g in self._found.gains[str(step)])) for step in steps]
        logs = np.interp(np.arange(self._steps), steps, np.log(np.maximum(sizes, 1e-6)))
        return [float(f"{value:.6g}") for value in np.exp(logs)]

    def _scale(self) -> float:
        return statistics.fmean(self._found.scales)

    def _finish(self) -> Calibration:
        grams = {
            stream: mean_gram(from_triangle(one[stream], self._steps) for one in self._found.grams)
            for stream in self._found.grams[0]
        }
        return Calibration.model_validate(
            {
                "conditions": self._conditions,
                "prompts": [request.prompt for request in self._requests],
                "seeds": [request.seed for request in self._requests],
                "noise_levels": self._levels,
                "grams": {stream: to_triangle(gram) for stream, gram in grams.items()},
                "sensitivity": self._sensitivity(),
                "scale": self._scale(),
                "trials": self._found.trials,
                "seconds": {
                    **StepSeconds.medians(self._found.computed, self._found.forecast)._asdict(),
                    "ranks": self._engine.ranks.size,
                },
                "made": datetime.now(UTC).date(),
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
        return hashlib.sha256(json.dumps(recipes).encode()).hexdigest()

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
    if len(requests) < 2:
        raise BadRequestError(
            f"prompts: {len(requests)} given; a calibration needs at least 2, preferably 8 or more"
        )
    alike = {r.model_copy(update={"prompt": "", "seed": 0}).model_dump_json() for r in requests}
    if len(alike) > 1:
        raise BadRequestError("prompts: the videos of a calibration may differ only in prompt and seed")
