"""Run of a plan on one rank: networks, noise and conditioning, from which each segment is denoised.

Tensor legend: B batch, C latent channels, F latent frames, H, W latent height and width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import SchedulerMixin

from runtime.models.base import Condition
from runtime.recipe import Recipe
from runtime.request.windows import Windows
from runtime.sampling.evaluator import Evaluator
from runtime.sampling.fitted import FittedStream
from runtime.sampling.fused import FusedStream
from runtime.sampling.network import Networks
from runtime.sampling.plan import Plan
from runtime.sampling.streams import STREAMS, ComputedStream, Stream
from runtime.sampling.windowed import WindowedStream


@dataclass(frozen=True, slots=True)
class Segment:
    """Part of a video that is denoised in one pass.

    Attributes:
        noise_BCFHW: initial noise, float32, the same on every rank.
        sampler: its sampler, at the first step.
        stream: its stream, with an empty history.
        before: number of latent frames at its beginning that belong to the segment before.
        known_BCFHW: latents of its first frames, where those are known; see `Condition`.
    """

    noise_BCFHW: torch.Tensor
    sampler: SchedulerMixin
    stream: Stream
    before: int = 0
    known_BCFHW: torch.Tensor | None = None

    def follow(self, before_BCFHW: torch.Tensor | None, latents_BCFHW: torch.Tensor) -> torch.Tensor:
        """Append this segment's latents to all earlier ones."""
        if before_BCFHW is None:
            return latents_BCFHW
        return torch.cat([before_BCFHW, latents_BCFHW[:, :, self.before :]], dim=2)


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a plan on this rank, ready to be denoised.

    Attributes:
        plan: the plan.
        recipe: everything that the result is a function of.
        networks: the transformers with the text of each window, and the first window's image conditioning.
        noise_BCFHW: noise of the whole video, float32, the same on every rank.
        image: conditioning of the first window beside its text; None for a model that takes none.
        before_BCFHW: clean latents of the video that this one extends; None if it begins anew.
        storage: device on which histories are kept; None for the one on which they are computed.
        warnings: sentences about parts of the request that may have unintended effects, on the first rank.
    """

    plan: Plan
    recipe: Recipe
    networks: list[Networks]
    noise_BCFHW: torch.Tensor
    image: Condition | None = None
    before_BCFHW: torch.Tensor | None = None
    storage: torch.device | None = None
    warnings: tuple[str, ...] = ()

    @property
    def network(self) -> Networks:
        """Networks of the first window, which is the only one if the video fits the model."""
        return self.networks[0]

    @property
    def known(self) -> torch.Tensor | None:
        """Latents of the first frames of the first window, where those are known; see `Condition`."""
        return None if self.image is None else self.image.known

    def segment(self, number: int, before_BCFHW: torch.Tensor | None) -> Segment:
        """Make segment `number`.

        Args:
            number: index of the segment.
            before_BCFHW: clean latents of all that is before it; None if the video begins with it.
        """
        sampler, condition, before = self.plan.fresh_sampler(), self.image, 0
        if self.plan.segments == 1 and before_BCFHW is None:
            stream = self._open(self.networks, self.plan.windows, self.noise_BCFHW, sampler)
            return Segment(self.noise_BCFHW, sampler, stream, known_BCFHW=self.known)
        own, network = self.plan.windows.slice(number), self.networks[number]
        if before_BCFHW is not None:
            assert condition is not None
            tail_BCFHW = before_BCFHW[:, :, own.start :]
            before = tail_BCFHW.shape[2]
            condition = condition.continued_from(tail_BCFHW)
            network = network.conditioned(condition)
        noise_BCFHW, length = self.noise_BCFHW[:, :, own].contiguous(), self.plan.windows.length
        stream = self._open([network], Windows(length, length, (0,)), noise_BCFHW, sampler)
        known_BCFHW = None if condition is None else condition.known
        return Segment(noise_BCFHW, sampler, stream, before, known_BCFHW)

    def open_stream(self) -> Stream:
        """Make the preset's stream for all windows together, with an empty history."""
        return self._open(self.networks, self.plan.windows, self.noise_BCFHW, self.plan.fresh_sampler())

    def _open(
        self,
        networks: Sequence[Networks],
        windows: Windows,
        noise_BCFHW: torch.Tensor,
        sampler: SchedulerMixin,
    ) -> Stream:
        """Make the stream of a segment of one or several windows; some take the steps by themselves."""
        preset = self.plan.preset
        fitted = preset.fitted
        if fitted is not None:
            evaluator = Evaluator(networks, windows, apart=fitted.solver.width == 2)
            predictor = preset.build_predictor(self.plan.steps)
            return FittedStream(evaluator, fitted, noise_BCFHW, sampler, predictor, self.storage)
        if self.plan.fused is not None:
            evaluator = Evaluator(networks, windows, apart=False)
            predictor = preset.build_predictor(self.plan.steps)
            return FusedStream(evaluator, self.plan.fused, noise_BCFHW, predictor, self.storage)
        streams = [self._open_one(network) for network in networks]
        return streams[0] if len(streams) == 1 else WindowedStream(streams, windows)

    def _open_one(self, network: Networks) -> Stream:
        preset = self.plan.preset
        if not preset.forecasts:
            return ComputedStream(network)
        return STREAMS[preset.stream](network, preset.build_predictor(self.plan.steps), self.storage)
