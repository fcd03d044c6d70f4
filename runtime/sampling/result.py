"""Result of a generation, without its frames, which went to the sinks."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from runtime.forecasting.expectation import Expectation
from runtime.request.memory import Memory
from runtime.request.performance import Performance
from runtime.request.video_request import BRANCHES
from runtime.sampling.denoise import Denoising, StepRecord, summed
from runtime.sampling.plan import Plan
from spectrum import StepSeconds, Stopwatch


@dataclass(slots=True)
class PhaseSeconds:
    """Wall time of each phase on this rank, in seconds; `lora` is that of switching LoRAs."""

    lora: float = 0.0
    encode: float = 0.0
    denoise: float = 0.0
    decode: float = 0.0
    write: float = 0.0

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, phase, getattr(self, phase) + time.perf_counter() - started)


@dataclass(slots=True)
class Result:
    """Result of one generation: what was decided, what it took, and digests of the frames.

    Attributes:
        plan: the plan that was carried out.
        recipe: digest of everything that the result is a function of.
        steps: records of all steps, in order; times are this rank's.
        seconds: wall time of each phase.
        computed: branch → its computed steps.
        errors: computed step → relative error that a forecast would have had, over all ranks and branches.
        expectation: errors that were expected.
        digests: digests of the decisions, one per rank.
        sent: bytes sent by all ranks together, at each step.
        sent_by_axis: the same for each axis of the topology along which any were sent.
        resumed_at: first step that was not taken from a checkpoint.
        checkpoint_bytes: bytes of checkpoints written by this rank.
        forecaster_bytes: largest number of bytes that a rank held for forecasting.
        features_kept: number of values remembered of each forecast stream.
        performs: what made its steps faster.
        kernel: attention kernel that ran; where torch chose, the one that it chose.
        memory: where idle weights were.
        weight_bytes: most bytes of the transformers' weights that were on this rank's device at one time.
        device_peak: most bytes that were allocated on this rank's GPU at one time; None without one.
        device, dtype: this rank's device, and what its transformers computed in.
        fps: frames per second of the videos.
        preview_seconds: time that each preview took of denoising on this rank; None if none were wanted.
        frames_sha256: digest of each video's frames, on the first rank.
        warnings: sentences about parts of the request that may have unintended effects.
    """

    plan: Plan
    recipe: str = ""
    steps: list[StepRecord] = field(default_factory=list)
    seconds: PhaseSeconds = field(default_factory=PhaseSeconds)
    computed: dict[str, list[int]] = field(default_factory=dict)
    errors: dict[int, float] = field(default_factory=dict)
    expectation: Expectation = field(default_factory=Expectation)
    digests: list[str] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)
    sent_by_axis: list[dict[str, int]] = field(default_factory=list)
    resumed_at: int = 0
    checkpoint_bytes: int = 0
    forecaster_bytes: int = 0
    features_kept: int = 0
    performs: Performance = field(default_factory=Performance)
    kernel: str = ""
    memory: Memory = field(default_factory=Memory)
    weight_bytes: int = 0
    device_peak: int | None = None
    device: str = ""
    dtype: str = ""
    fps: int = 0
    preview_seconds: list[float] | None = None
    frames_sha256: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def add(self, done: Denoising, told: Sequence[dict[str, Any]], start: int) -> None:
        """Add a finished segment; its steps are numbered after the earlier ones.

        Args:
            done: state of the segment after its last step.
            told: each rank's bytes `sent` at each step by axis, its stream's `bytes` and `kept`, and the
                `digest` of its decisions.
            start: first step that was not taken from a checkpoint.
        """
        before, coordinator = len(self.steps), done.coordinator
        self.steps += [replace(step, index=before + step.index) for step in done.steps]
        for branch in BRANCHES:
            computed = [before + step for step in coordinator.computed(branch)]
            self.computed[branch] = self.computed.get(branch, []) + computed
        self.errors |= {before + step: error for step, error in coordinator.errors.items()}
        self.digests = [one["digest"] for one in told]
        by_axis = [summed(sent) for sent in zip(*(one["sent"] for one in told), strict=True)]
        self.sent += [sum(sent.values()) for sent in by_axis]
        self.sent_by_axis += by_axis
        self.forecaster_bytes = max(self.forecaster_bytes, *(one["bytes"] for one in told))
        self.features_kept = max(self.features_kept, *(one["kept"] for one in told))
        if start:
            self.resumed_at = before + start

    @property
    def step_seconds(self) -> StepSeconds:
        """Median seconds of a computed and a forecast step on this rank, restored steps included."""
        watch = Stopwatch()
        for step in self.steps:
            watch.add(step.kind, step.seconds)
        return watch.typical

    @property
    def nfe(self) -> int:
        """Largest number of computed transformer evaluations of a branch."""
        return max(len(steps) for steps in self.computed.values())
