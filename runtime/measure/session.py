"""Session of a calibration: its videos on one engine, and what all stages do with them.

Tensor legend: C, F, H, W latent channels, frames, height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch

from runtime.engine import Engine
from runtime.forecasting.presets import Preset
from runtime.media.mp4 import FrameBuffer, Frames
from runtime.request.video_request import VideoRequest
from runtime.sampling.coordinator import Coordinator
from runtime.sampling.denoise import Denoising, StepRecord, denoise
from runtime.sampling.plan import Plan
from runtime.sampling.result import Result
from runtime.sampling.run import Run
from runtime.sampling.streams import Stream
from spectrum import FixedSchedule, Schedule

OnRunStep = Callable[[str, StepRecord], None]
"""Called with the name of the run and the record of each of its steps."""

_T = TypeVar("_T")


class Session:
    """Makes runs of a calibration's videos, as one rank of the engine's group.

    Args:
        engine: the model.
        requests: the videos, to be made by the full sampler.
        on_step: shows progress.

    Attributes:
        plan: plan of the first video, which the others share but for prompt and seed.
    """

    def __init__(self, engine: Engine, requests: Sequence[VideoRequest], on_step: OnRunStep):
        self.engine, self.ranks, self.requests, self.on_step = engine, engine.ranks, list(requests), on_step
        self.plan: Plan = engine.plan(self.requests[0])

    @property
    def steps(self) -> int:
        """Number of sampler steps n."""
        return self.plan.steps

    @property
    def videos(self) -> int:
        """Number of videos."""
        return len(self.requests)

    @property
    def shape(self) -> Sequence[int]:
        """Shape of a video's latents."""
        return self.engine.sizes.shape(self.requests[0])

    def prepare(self, video: int, preset: Preset | None = None) -> Run:
        """Prepare a run of one of the videos, by default with the full sampler's preset."""
        return self.engine.prepare(self.engine.plan(self.requests[video], preset or self.plan.preset))

    def denoising(self, run: Run, stream: Stream, name: str, schedule: Schedule | None = None) -> Denoising:
        """Begin to denoise a run by `stream`, on a schedule or by the full sampler."""
        course = run.plan.course
        coordinator = Coordinator(
            dict.fromkeys(run.plan.request.branches, schedule or FixedSchedule.full(self.steps)),
            name,
            self.ranks,
            commands=self.engine.commands,
            course=course,
            forced=course.forced(outputs=True),
        )
        sampler = run.plan.fresh_sampler()
        return Denoising(run.noise_BCFHW, sampler, stream, coordinator, run.known)

    def walk(self, state: Denoising, name: str, start: int = 0) -> Iterator[StepRecord]:
        """Denoise to the end, yielding every step."""
        for record in denoise(state, self.ranks, start):
            self.on_step(name, record)
            yield record

    def share(self, latents: Sequence[torch.Tensor], video: int) -> torch.Tensor:
        """Broadcast a video's latents, which the first rank has, to every rank."""
        latents_BCFHW = torch.empty(*self.shape, device=self.ranks.device)
        if self.ranks.is_leader:
            latents_BCFHW.copy_(latents[video])
        self.ranks.everyone.broadcast(latents_BCFHW)
        return latents_BCFHW

    def tell(self, value: _T) -> _T:
        """Tell every rank what the first one knows."""
        told: _T = self.ranks.control.all_gather_object(value)[0]
        return told

    def frames(self, latents_BCFHW: torch.Tensor) -> Frames:
        """Decode the frames of all videos, `[T, H, W, 3]` on the first rank, empty on the others."""
        sinks = [FrameBuffer() for _ in range(latents_BCFHW.shape[0])] if self.ranks.is_leader else []
        self.engine.decode(latents_BCFHW, sinks, Result(self.plan))
        return np.concatenate([sink.frames for sink in sinks]) if sinks else np.empty((0, 0, 0, 3), np.uint8)
