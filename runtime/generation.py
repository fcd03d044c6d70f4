"""What a generation is before, while and after it runs.

Tensor legend: B batch, C latent channels, F latent frames, H, W latent height and width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from diffusers import SchedulerMixin

from runtime.denoise import StepRecord
from runtime.expectation import Expectation
from runtime.presets import Preset
from runtime.request import VideoRequest
from runtime.streams import STREAMS, ComputedStream, Network, Stream
from runtime.topology import Topology
from runtime.windows import WindowedStream, Windows
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
        windows: evaluated at every computed step; one where the video fits the model.
        frames_sha256: of each video's frames, on the first rank.
    """

    request: VideoRequest
    preset: Preset
    topology: Topology
    attention: str
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
        schedules: branch → which of its steps are computed.
        attention: resolved name of the self-attention's kernel.
        windows: what is evaluated at a time; one where the video fits the model.
    """

    request: VideoRequest
    preset: Preset
    fresh_sampler: Callable[[], SchedulerMixin]
    steps: int
    schedules: dict[str, Schedule]
    topology: Topology
    attention: str
    windows: Windows

    @property
    def kinds(self) -> list[StepKind]:
        """The kind of every step, as far as it is known beforehand."""
        return self.preset.expected_kinds(self.steps)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A plan that is ready to be denoised, on this rank.

    Attributes:
        networks: the transformer with the text of each window.
        noise_BCFHW: float32, the same on every rank.
    """

    plan: Plan
    networks: list[Network]
    noise_BCFHW: torch.Tensor

    @property
    def network(self) -> Network:
        """That of the first window, which is the only one where the video fits the model."""
        return self.networks[0]

    def open_stream(self) -> Stream:
        """The stream of the plan's preset, with nothing remembered."""
        windows = self.plan.windows
        if len(windows) == 1:
            return self._open_one(self.network)
        return WindowedStream([self._open_one(network) for network in self.networks], windows)

    def _open_one(self, network: Network) -> Stream:
        preset = self.plan.preset
        if not preset.forecasts:
            return ComputedStream(network)
        return STREAMS[preset.stream](network, preset.build_predictor(self.plan.steps))
