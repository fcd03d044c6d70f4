"""The denoising loop: decide → compute or forecast → step the sampler.

Tensor legend: B batch, C latent channels, F latent frames, H, W latent height and width.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from diffusers import SchedulerMixin

from runtime.errors import CancelledError
from runtime.parallel.ranks import Ranks
from runtime.sampling.commands import Command
from runtime.sampling.coordinator import Coordinator
from runtime.sampling.estimate import Estimate, OnEstimate, unseen, with_known
from runtime.sampling.finite import check_finite, size_of
from runtime.sampling.network import Moved
from runtime.sampling.streams import Stream
from spectrum import StepKind


@dataclass(frozen=True, slots=True)
class StepRecord:
    """Record of one step of denoising.

    Attributes:
        index: step i, 0 ≤ i < n.
        kind: computed (any branch) or forecast.
        timestep: the sampler's timestep, 1000 … 0.
        seconds: wall time of the step on this rank, including the accelerator's work.
        sent: bytes that this rank sent to other ranks.
        sent_by_axis: the same for each axis of the topology along which it sent any.
        expert: name of the transformer that the step is of.
        error: of a computed step, the relative error that its forecast would have had, as far as this rank
            knows; None if there was nothing to forecast it from.
    """

    index: int
    kind: StepKind
    timestep: float
    seconds: float
    sent: int = 0
    expert: str = ""
    error: float | None = None
    sent_by_axis: Mapping[str, int] = field(default_factory=dict)


def summed(sent: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Add up bytes sent by several ranks, axis by axis."""
    total: Counter[str] = Counter()
    for one in sent:
        total.update(one)
    return dict(total)


OnStep = Callable[[StepRecord], None]
"""Called with the record of each step that is done."""


@dataclass(slots=True)
class Denoising:
    """State of one segment's denoising on one rank, which changes from step to step.

    Attributes:
        latents_BCFHW: latents in float32, the same on every rank; replaced at every step that makes new ones.
        sampler: a diffusers scheduler for flow models with its timesteps set, at its beginning.
        stream: computes or forecasts the guided velocity.
        coordinator: decides which steps are computed.
        known_BCFHW: latents of the first frames, where those are known: they take the place of what is
            denoised there, in estimates and at the end.
        steps: records of the steps that are done, in order.
    """

    latents_BCFHW: torch.Tensor
    sampler: SchedulerMixin
    stream: Stream
    coordinator: Coordinator
    known_BCFHW: torch.Tensor | None = None
    steps: list[StepRecord] = field(default_factory=list)


@torch.no_grad()
def denoise(
    state: Denoising, ranks: Ranks, start: int = 0, on_estimate: OnEstimate = unseen
) -> Iterator[StepRecord]:
    """Denoise `state.latents_BCFHW` from noise to clean latents, yielding after every step.

    The caller sets the pace: it may stop iterating after any step, and `state` is then complete up to that
    step.

    Args:
        state: latents, sampler, stream and coordinator, at the beginning or as restored.
        ranks: all ranks of the group.
        start: first step to take; earlier ones were restored from a checkpoint.
        on_estimate: given the clean estimate of every computed step; part of the step's time.

    Raises:
        CancelledError: the generation was stopped or cancelled.
        NotFiniteError: a step produced NaN or infinity.
        RankFailedError: another rank failed.
    """
    sampler, coordinator = state.sampler, state.coordinator
    times = [float(one) for one in sampler.timesteps.tolist()]  # once: they are on the accelerator
    for index in range(start, len(times)):
        started, before = time.perf_counter(), ranks.traffic.axes.copy()
        decision = coordinator.decide(index)
        timestep_B = sampler.timesteps[index].expand(state.latents_BCFHW.shape[0])
        output = state.stream.advance(index, decision.kinds, state.latents_BCFHW, timestep_B)
        velocity_BCFHW, moved = output.velocity_BCFHW, output.moved
        if moved is None:
            if decision.kind is StepKind.COMPUTE or ranks.traffic.axes != before:
                ranks.synchronize()  # the sampler reads numbers back, and would wait there for a lost rank
            moved = _sampled(state, index, velocity_BCFHW)
        state.latents_BCFHW = moved.after_BCFHW
        if moved.made_BCFHW is not None:  # if not, nothing was queued that could be waited for
            size = size_of(moved.made_BCFHW)
            ranks.synchronize()
            check_finite(size, index, decision.kind, output.parts, ranks)
        if decision.kind is StepKind.COMPUTE:
            coordinator.observe(index, output.squares)
            noise = times[index] / sampler.config.num_train_timesteps
            on_estimate(Estimate(moved.before_BCFHW, velocity_BCFHW, noise, state.known_BCFHW))
        seconds = time.perf_counter() - started
        coordinator.timed(seconds)
        sent = ranks.traffic.axes - before
        record = StepRecord(
            index,
            decision.kind,
            times[index],
            seconds,
            sent.total(),
            decision.expert,
            coordinator.error_of(index),
            dict(sent),
        )
        state.steps.append(record)
        yield record
        if decision.command is Command.STOP:
            raise CancelledError(f"stopped after step {index}")
    if state.known_BCFHW is not None:
        state.latents_BCFHW = with_known(state.latents_BCFHW, state.known_BCFHW)
    coordinator.finish()


def _sampled(state: Denoising, index: int, velocity_BCFHW: torch.Tensor) -> Moved:
    """Let the sampler take a step."""
    sampler, before_BCFHW = state.sampler, state.latents_BCFHW
    timestep = sampler.timesteps[index]
    after_BCFHW = sampler.step(velocity_BCFHW, timestep, before_BCFHW, return_dict=False)[0]
    return Moved(before_BCFHW, after_BCFHW, after_BCFHW)
