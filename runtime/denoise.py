"""The denoising loop: decide → compute or forecast → step the sampler.

Tensor legend: B batch, C latent channels, F latent frames, H, W latent height and width.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from diffusers import SchedulerMixin

from runtime.coordinator import Coordinator
from runtime.streams import Stream
from spectrum import StepKind


@dataclass(slots=True)
class Denoising:
    """What changes from step to step, beside the stream's and the sampler's own state."""

    latents_BCFHW: torch.Tensor


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What happened at one step.

    Attributes:
        index: step i, 0 ≤ i < n.
        kind: computed or forecast.
        timestep: the sampler's timestep, 1000 … 0.
        seconds: wall time of the step, the accelerator's work included.
        error: see `StreamOutput.error`.
    """

    index: int
    kind: StepKind
    timestep: float
    seconds: float
    error: float | None


@torch.no_grad()
def denoise(
    state: Denoising, sampler: SchedulerMixin, stream: Stream, coordinator: Coordinator
) -> Iterator[StepRecord]:
    """Take `state.latents_BCFHW` from noise to a clean latent, yielding after every step.

    The caller owns the pace: it may stop iterating after any step, and `state` is then complete up to that
    step.

    Args:
        state: latents in float32; replaced at every step.
        sampler: a diffusers scheduler for flow models with its timesteps set, at its beginning.
        stream: gives the guided velocity.
        coordinator: says which steps are computed.
    """
    for index, timestep in enumerate(sampler.timesteps):
        started = time.perf_counter()
        timestep_B = timestep.expand(state.latents_BCFHW.shape[0])
        decision = coordinator.decide(index)
        evaluate = stream.record if decision.kind is StepKind.COMPUTE else stream.predict
        output = evaluate(index, state.latents_BCFHW, timestep_B)
        state.latents_BCFHW = sampler.step(
            output.velocity_BCFHW, timestep, state.latents_BCFHW, return_dict=False
        )[0]
        _wait_for(state.latents_BCFHW.device)
        yield StepRecord(index, decision.kind, float(timestep), time.perf_counter() - started, output.error)


def _wait_for(device: torch.device) -> None:
    """Wait for the accelerator's queue, so that a step's time is its own."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
