"""Plan of a generation, its segments, and its result.

Tensor legend: B batch, C latent channels, F latent frames, H, W latent height and width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from diffusers import SchedulerMixin

from runtime.forecasting.expectation import Expectation
from runtime.forecasting.presets import Preset
from runtime.forecasting.streams import STREAM_TRAITS
from runtime.models.base import ImageCondition
from runtime.parallel.topology import Topology
from runtime.recipe import Recipe
from runtime.request.video_request import BRANCHES, VideoRequest
from runtime.request.windows import Windows
from runtime.sampling.coordinator import Coordinator
from runtime.sampling.course import Course
from runtime.sampling.denoise import StepRecord
from runtime.sampling.network import Networks
from runtime.sampling.streams import STREAMS, ComputedStream, Stream
from runtime.sampling.windowed import WindowedStream
from spectrum import Schedule, StepKind


@dataclass(slots=True)
class Seconds:
    """Wall time of each phase on this rank, in seconds."""

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
class Generation:
    """Record of one generation, without the frames, which went to the sinks.

    Attributes:
        request, preset, topology: the request, its preset, and the arrangement of the ranks.
        attention: resolved name of the attention kernel.
        recipe: digest of everything that the result is a function of.
        steps: records of all steps, in order; times are this rank's.
        seconds: wall time of each phase.
        computed: branch → its computed steps.
        errors: computed step → relative error that a forecast would have had, over all ranks and branches.
        expectation: errors that were expected.
        digests: digests of the decisions, one per rank.
        sent: bytes sent by all ranks together, at each step.
        resumed_at: first step that was not taken from a checkpoint.
        checkpoint_bytes: bytes of checkpoints written by this rank.
        forecaster_bytes: largest number of bytes that a rank held for forecasting.
        features_kept: number of values remembered of each forecast stream.
        windows: number of windows, evaluated together at every computed step, or one after the other.
        frames_sha256: digest of each video's frames, on the first rank.
        warnings: sentences about parts of the request that may have unintended effects.
    """

    request: VideoRequest
    preset: Preset
    topology: Topology
    attention: str
    recipe: str = ""
    steps: list[StepRecord] = field(default_factory=list)
    seconds: Seconds = field(default_factory=Seconds)
    computed: dict[str, list[int]] = field(default_factory=dict)
    errors: dict[int, float] = field(default_factory=dict)
    expectation: Expectation = field(default_factory=Expectation)
    digests: list[str] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)
    resumed_at: int = 0
    checkpoint_bytes: int = 0
    forecaster_bytes: int = 0
    features_kept: int = 0
    windows: int = 1
    frames_sha256: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def add(
        self,
        steps: Sequence[StepRecord],
        coordinator: Coordinator,
        told: Sequence[dict[str, Any]],
        start: int,
    ) -> None:
        """Add a finished segment; its steps are numbered after the earlier ones.

        Args:
            steps: records of the segment's steps.
            coordinator: coordinator of the segment.
            told: each rank's bytes `sent` at each step, its stream's `bytes` and `kept`, and the `digest` of
                its decisions.
            start: first step that was not taken from a checkpoint.
        """
        before = len(self.steps)
        self.steps += [replace(step, index=before + step.index) for step in steps]
        for branch in BRANCHES:
            computed = [before + step for step in coordinator.computed(branch)]
            self.computed[branch] = self.computed.get(branch, []) + computed
        self.errors |= {before + step: error for step, error in coordinator.errors.items()}
        self.digests = [one["digest"] for one in told]
        self.sent += [sum(sent) for sent in zip(*(one["sent"] for one in told), strict=True)]
        self.forecaster_bytes = max(self.forecaster_bytes, *(one["bytes"] for one in told))
        self.features_kept = max(self.features_kept, *(one["kept"] for one in told))
        if start:
            self.resumed_at = before + start

    @property
    def nfe(self) -> int:
        """Largest number of computed transformer evaluations of a branch."""
        return max(len(steps) for steps in self.computed.values())


@dataclass(frozen=True, slots=True)
class Plan:
    """A request with all decisions that can be made before it runs.

    Attributes:
        request, preset: the request and its preset.
        fresh_sampler: makes a sampler at its first step, with its timesteps set.
        steps: number of sampler steps.
        topology: arrangement of the ranks.
        attention: resolved name of the attention kernel.
        windows: windows of the video; a single one if the video fits the model.
        course: expert that computes each step.
    """

    request: VideoRequest
    preset: Preset
    fresh_sampler: Callable[[], SchedulerMixin]
    steps: int
    topology: Topology
    attention: str
    windows: Windows
    course: Course

    @property
    def forced(self) -> frozenset[int]:
        """Steps that are computed whatever the schedule says: an expert's first, where it begins anew."""
        return self.course.forced(outputs=STREAM_TRAITS[self.preset.stream].outputs)

    @property
    def segments(self) -> int:
        """Number of segments that are denoised one after the other.

        It is 1 without an image, however many windows there are; with an image each window is a segment,
        which continues the one before.
        """
        return len(self.windows) if self.request.image is not None else 1

    @property
    def kinds(self) -> list[StepKind]:
        """Expected kind of every step of all segments."""
        kinds = self.preset.expected_kinds(self.steps)
        for step in self.forced:
            kinds[step] = StepKind.COMPUTE
        return kinds * self.segments

    def expectation(self, coordinator: Coordinator) -> Expectation:
        """Expected errors of a finished generation of one segment."""
        return self.preset.expectation(
            self.steps,
            coordinator.computed("cond"),
            coordinator.errors,
            coordinator.schedules,
            coordinator.dropped,
        )

    def fresh_schedules(self) -> dict[str, Schedule]:
        """Make the schedule of each branch; schedules have state, so each segment needs new ones."""
        return self.preset.schedules_of(self.steps, self.request.branches)


@dataclass(frozen=True, slots=True)
class Segment:
    """Part of a video that is denoised in one pass.

    Attributes:
        noise_BCFHW: initial noise, float32, the same on every rank.
        stream: its stream, with an empty history.
        known: number of latent frames at its beginning that belong to the segment before.
    """

    noise_BCFHW: torch.Tensor
    stream: Stream
    known: int = 0

    def follow(self, before_BCFHW: torch.Tensor | None, latents_BCFHW: torch.Tensor) -> torch.Tensor:
        """Append this segment's latents to all earlier ones."""
        if before_BCFHW is None:
            return latents_BCFHW
        return torch.cat([before_BCFHW, latents_BCFHW[:, :, self.known :]], dim=2)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A plan that is ready to be denoised on this rank.

    Attributes:
        plan: the plan.
        recipe: everything that the result is a function of.
        networks: the transformers with the text of each window, and the first window's image conditioning.
        noise_BCFHW: noise of the whole video, float32, the same on every rank.
        image: image conditioning of the first window; None for a video from text alone.
        storage: device on which histories are kept; None for the one on which they are computed.
        warnings: sentences about parts of the request that may have unintended effects, on the first rank.
    """

    plan: Plan
    recipe: Recipe
    networks: list[Networks]
    noise_BCFHW: torch.Tensor
    image: ImageCondition | None = None
    storage: torch.device | None = None
    warnings: tuple[str, ...] = ()

    @property
    def network(self) -> Networks:
        """Networks of the first window, which is the only one if the video fits the model."""
        return self.networks[0]

    def segment(self, number: int, before_BCFHW: torch.Tensor | None) -> Segment:
        """Make segment `number`.

        Args:
            number: index of the segment.
            before_BCFHW: clean latents of all earlier segments; None for the first.
        """
        if self.plan.segments == 1:
            return Segment(self.noise_BCFHW, self.open_stream())
        own, network, known = self.plan.windows.slice(number), self.networks[number], 0
        if before_BCFHW is not None:
            assert self.image is not None
            tail_BCFHW = before_BCFHW[:, :, own.start :]
            known = tail_BCFHW.shape[2]
            condition = self.image.continued_from(tail_BCFHW)
            network = network.conditioned(condition.latents_BCFHW)
        return Segment(self.noise_BCFHW[:, :, own].contiguous(), self._open_one(network), known)

    def open_stream(self) -> Stream:
        """Make the preset's stream for all windows together, with an empty history."""
        windows = self.plan.windows
        if len(windows) == 1:
            return self._open_one(self.network)
        return WindowedStream([self._open_one(network) for network in self.networks], windows)

    def _open_one(self, network: Networks) -> Stream:
        preset = self.plan.preset
        if not preset.forecasts:
            return ComputedStream(network)
        return STREAMS[preset.stream](network, preset.build_predictor(self.plan.steps), self.storage)
