"""Findings of a calibration, run by run, and the file's content that they become.

1. Every video is made once by the full sampler, for the Gram matrices of its streams.
2. Some of the videos are run again, with the velocity of a step nudged along its own change, as a forecast
   would be off. The part of the nudge left at the end is the step's sensitivity, and what it does to the next
   velocity the response.
3. Every video is made again with schedules planned from all the others, to relate expected to actual errors.

Legend: n sampler steps.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from spectrum.calibrated import CalibratedPredictor, Gram, mean_gram
from spectrum.calibration.measured import Measured, from_triangle, make_planner, to_triangle
from spectrum.planner import Planner
from spectrum.seconds import StepSeconds

if TYPE_CHECKING:
    import torch

SCHEMA = 2
LEAST_STEPS, LEAST_VIDEOS = 4, 2
_NUDGED_EARLY = (0.02, 0.06, 0.12, 0.25)  # fractions of the last step; sensitivities vary much here,
_NUDGED_LATE = (0.45, 0.72, 1.0)  # and little here
_EVERY, _LATE_VIDEOS = 2, 3  # every second video is nudged early, and three of them late, too
_TRIALS = (0.16, 0.2, 0.28, 0.4)  # computed steps, as fractions of all


def nudged_steps(video: int, steps: int) -> list[int]:
    """Steps at which a video is nudged, in a run of its own each."""
    if video % _EVERY:
        return []
    shares = _NUDGED_EARLY + (_NUDGED_LATE if video < _EVERY * _LATE_VIDEOS else ())
    return sorted({max(1, round(share * (steps - 1))) for share in shares})


def trial_budgets(steps: int) -> list[int]:
    """Numbers of computed steps of the trials."""
    return sorted({max(2, round(share * steps)) for share in _TRIALS})


@dataclass(slots=True)
class Findings:
    """Findings so far, as JSON values, except for the latents, which only the first rank has.

    Attributes:
        grams: for each video, stream → lower triangle of its Gram matrix.
        scales: for each video, root mean square of the guided velocity over that of the final latent.
        trajectories: for each video, lower triangle of the Gram matrix of its noise and guided velocities,
            divided by the squared norm of its final latent.
        gains: step → sizes of nudges in the final latent, relative to their sizes after the step.
        responses: step → changes of the velocity that nudges of the step before have caused, relative to
            those of the latent.
        trials: trials, as in the calibration.
        passes: trial passes of solvers.
        fits: solvers, as in the calibration.
        computed, forecast: seconds of steps of each kind.
        latents: final latents of each video.
    """

    grams: list[dict[str, list[float]]] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    trajectories: list[list[float]] = field(default_factory=list)
    gains: dict[str, list[float]] = field(default_factory=dict)
    responses: dict[str, list[float]] = field(default_factory=dict)
    trials: list[dict[str, Any]] = field(default_factory=list)
    passes: list[dict[str, Any]] = field(default_factory=list)
    fits: list[dict[str, Any]] = field(default_factory=list)
    computed: list[float] = field(default_factory=list)
    forecast: list[float] = field(default_factory=list)
    latents: list[torch.Tensor] = field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        """Everything but the latents, as JSON values."""
        return {name: getattr(self, name) for name in self.__slots__ if name != "latents"}

    def add_run(self, grams: Mapping[str, Gram], trajectory: Gram, size: float) -> None:
        """Add a full run.

        Args:
            grams: stream → Gram matrix `[n, n]`, of `guided` among others.
            trajectory: Gram matrix of the noise and the guided velocities, `[n + 1, n + 1]`.
            size: norm of the final latent.
        """
        root = math.sqrt(float(np.trace(grams["guided"])) / len(grams["guided"]))
        self.grams.append({name: to_triangle(gram) for name, gram in grams.items()})
        self.trajectories.append(to_triangle(trajectory / size**2))
        self.scales.append(root / size)

    def repeat_run(self, known: Measured) -> None:
        """Add a full run of which nothing but the mean over all runs is known any more."""
        self.grams.append({name: [*gram] for name, gram in known.grams.items()})
        self.trajectories.append([*known.trajectory])
        self.scales.append(known.scale)
        self.gains = {str(step): [value] for step, value in enumerate(known.sensitivity)}
        self.responses = {str(step): [value] for step, value in enumerate(known.response)}

    def add_gain(self, step: int, left: float, made: float) -> None:
        """Add what is left at the end of a nudge, which `step` made so large in the latent."""
        self.gains.setdefault(str(step), []).append(left / max(made, 1e-30))

    def add_response(self, step: int, velocity: float, latent: float) -> None:
        """Add by how much a change of the latent before `step` changed its velocity."""
        self.responses.setdefault(str(step), []).append(velocity / max(latent, 1e-30))

    def mean(self, stream: str, steps: int) -> Gram:
        """Mean Gram matrix of a stream."""
        return mean_gram(from_triangle(one[stream], steps) for one in self.grams)

    def trajectory(self, steps: int) -> Gram:
        """Mean Gram matrix of noise and guided velocities, `[n + 1, n + 1]`."""
        mean: Gram = np.mean([from_triangle(one, steps + 1) for one in self.trajectories], axis=0)
        return mean

    def sensitivity(self, steps: int) -> list[float]:
        """Sensitivity of every step: mean of the gains, interpolated in the logarithm."""
        return _interpolated(self.gains, steps)

    def response(self, steps: int) -> list[float]:
        """Response of the velocity to the latent at every step, interpolated as the sensitivity is."""
        return _interpolated(self.responses, steps)

    @property
    def scale(self) -> float:
        """Mean of the scales."""
        return statistics.fmean(self.scales)

    def planner(self, levels: Sequence[float]) -> Planner:
        """Planner of the guided stream.

        Args:
            levels: σ of the sampler, `[n + 1]`.
        """
        return self._forecasting(self.grams, levels)[1]

    def without(self, video: int, levels: Sequence[float]) -> tuple[CalibratedPredictor, Planner]:
        """Predictor and planner of the guided stream, made from all other videos.

        Args:
            levels: σ of the sampler, `[n + 1]`.
        """
        return self._forecasting([grams for index, grams in enumerate(self.grams) if index != video], levels)

    def _forecasting(
        self, grams: Sequence[Mapping[str, list[float]]], levels: Sequence[float]
    ) -> tuple[CalibratedPredictor, Planner]:
        steps = len(levels) - 1
        predictor = CalibratedPredictor(mean_gram(from_triangle(one["guided"], steps) for one in grams))
        return predictor, make_planner(predictor, levels, self.sensitivity(steps), self.scale)

    def content(self, conditions: Mapping[str, Any], levels: Sequence[float], ranks: int) -> dict[str, Any]:
        """Content of the calibration file, but for prompts, seeds and versions.

        Args:
            conditions: what it depends on.
            levels: σ of the sampler, `[n + 1]`.
            ranks: number of ranks that made it.
        """
        steps = len(levels) - 1
        return {
            "schema": SCHEMA,
            "conditions": conditions,
            "noise_levels": list(levels),
            "grams": {stream: to_triangle(self.mean(stream, steps)) for stream in self.grams[0]},
            "trajectory": to_triangle(self.trajectory(steps)),
            "sensitivity": self.sensitivity(steps),
            "response": self.response(steps),
            "scale": self.scale,
            "trials": self.trials,
            "fits": sorted(self.fits, key=lambda fit: len(fit["nodes"])),
            "seconds": {**StepSeconds.medians(self.computed, self.forecast)._asdict(), "ranks": ranks},
            "made": datetime.now(UTC).date().isoformat(),
        }


def _interpolated(measured: Mapping[str, list[float]], count: int) -> list[float]:
    """Mean of what was measured at some steps, interpolated in the logarithm.

    In a root mean square, one video in which errors grow a hundredfold would decide for all.
    """
    steps = sorted(int(step) for step in measured)
    means = [statistics.fmean(measured[str(step)]) for step in steps]
    logs = np.interp(np.arange(count), steps, np.log(np.maximum(means, 1e-6)))
    return [float(f"{value:.6g}") for value in np.exp(logs)]
