"""What a generation is before, while and after it runs.

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
from runtime.models.base import ImageCondition
from runtime.parallel.topology import Topology
from runtime.recipe import Recipe
from runtime.request.video_request import BRANCHES, VideoRequest
from runtime.request.windows import Windows
from runtime.sampling.coordinator import Coordinator
from runtime.sampling.denoise import StepRecord
from runtime.sampling.streams import STREAMS, ComputedStream, Network, Stream
from runtime.sampling.windowed import WindowedStream
from spectrum import Schedule, StepKind


@dataclass(slots=True)
class Seconds:
    """Wall time of each phase on this rank."""

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
    """What one generation did; the frames themselves went to the sinks.

    Attributes:
        recipe: digest of everything that the result is a function of.
        steps: in order; times are this rank's.
        computed: branch → its computed steps.
        errors: step → relative error that forecasts of a computed step would have had, over all ranks and
            branches.
        expectation: what was expected of it.
        digests: of the decisions, one per rank.
        sent: bytes that all ranks together moved at each step.
        resumed_at: first step that was not taken from a checkpoint.
        checkpoint_bytes: written by this rank.
        forecaster_bytes: the most that any rank held for forecasting.
        features_kept: values remembered of each thing that is forecast.
        windows: that were evaluated, at every computed step or one after the other.
        frames_sha256: of each video's frames, on the first rank.
        warnings: sentences about what is done but may not be what was meant.
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
        """Take in a segment that is done; its steps are counted on from those before.

        Args:
            told: what each rank tells: bytes `sent` at each step, what its stream has `bytes` and `kept`, and
                the `digest` of its decisions.
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
        """Evaluations of the branch that has the most."""
        return max(len(steps) for steps in self.computed.values())


@dataclass(frozen=True, slots=True)
class Plan:
    """A request with everything about it decided that can be decided before it runs.

    Attributes:
        fresh_sampler: makes the sampler, with its timesteps set, at its beginning.
        steps: of the sampler.
        attention: resolved name of the self-attention's kernel.
        windows: what is evaluated at a time; one where the video fits the model.
    """

    request: VideoRequest
    preset: Preset
    fresh_sampler: Callable[[], SchedulerMixin]
    steps: int
    topology: Topology
    attention: str
    windows: Windows

    @property
    def segments(self) -> int:
        """How often there is something to denoise: windows are one thing, but with an image, where each goes
        on from the one before."""
        return len(self.windows) if self.request.image is not None else 1

    @property
    def kinds(self) -> list[StepKind]:
        """The kind of every step of all segments, as far as it is known beforehand."""
        return self.preset.expected_kinds(self.steps) * self.segments

    def expectation(self, coordinator: Coordinator) -> Expectation:
        """What is to be expected of a generation of one segment, now that it is done."""
        return self.preset.expectation(
            self.steps,
            coordinator.computed("cond"),
            coordinator.errors,
            coordinator.schedules,
            coordinator.dropped,
        )

    def fresh_schedules(self) -> dict[str, Schedule]:
        """Branch → which of its steps are computed; they remember, so each segment has its own."""
        return self.preset.schedules_of(self.steps, self.request.branches)


@dataclass(frozen=True, slots=True)
class Segment:
    """What is denoised in one go.

    Attributes:
        noise_BCFHW: float32, the same on every rank.
        stream: with nothing remembered.
        known: latent frames at its beginning that the segment before has.
    """

    noise_BCFHW: torch.Tensor
    stream: Stream
    known: int = 0

    def follow(self, before_BCFHW: torch.Tensor | None, latents_BCFHW: torch.Tensor) -> torch.Tensor:
        """All latents so far, with its own."""
        if before_BCFHW is None:
            return latents_BCFHW
        return torch.cat([before_BCFHW, latents_BCFHW[:, :, self.known :]], dim=2)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A plan that is ready to be denoised, on this rank.

    Attributes:
        recipe: everything that the result is a function of.
        networks: the transformer with the text of each window, conditioned as the first window is.
        noise_BCFHW: float32, of the whole video, the same on every rank.
        image: what the first window is conditioned on, beside its text.
        storage: where what forecasts are made from is kept; None leaves it where it is computed.
        warnings: sentences about what is done but may not be what was meant; on the first rank.
    """

    plan: Plan
    recipe: Recipe
    networks: list[Network]
    noise_BCFHW: torch.Tensor
    image: ImageCondition | None = None
    storage: torch.device | None = None
    warnings: tuple[str, ...] = ()

    @property
    def network(self) -> Network:
        """That of the first window, which is the only one where the video fits the model."""
        return self.networks[0]

    def segment(self, number: int, before_BCFHW: torch.Tensor | None) -> Segment:
        """The segment of this number.

        Args:
            before_BCFHW: clean latents of all segments before it.
        """
        if self.plan.segments == 1:
            return Segment(self.noise_BCFHW, self.open_stream())
        own, network, known = self.plan.windows.slice(number), self.networks[number], 0
        if before_BCFHW is not None:
            assert self.image is not None
            tail_BCFHW = before_BCFHW[:, :, own.start :]
            known = tail_BCFHW.shape[2]
            condition = self.image.continued_from(tail_BCFHW)
            network = replace(network, condition_BCFHW=condition.latents_BCFHW)
        return Segment(self.noise_BCFHW[:, :, own].contiguous(), self._open_one(network), known)

    def open_stream(self) -> Stream:
        """The stream of the plan's preset for all windows together, with nothing remembered."""
        windows = self.plan.windows
        if len(windows) == 1:
            return self._open_one(self.network)
        return WindowedStream([self._open_one(network) for network in self.networks], windows)

    def _open_one(self, network: Network) -> Stream:
        preset = self.plan.preset
        if not preset.forecasts:
            return ComputedStream(network)
        return STREAMS[preset.stream](network, preset.build_predictor(self.plan.steps), self.storage)
