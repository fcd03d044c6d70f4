"""Denoising of one generation, segment by segment, each of which can be interrupted and resumed.

A video from text is one segment, however many windows it has. With an image each window is a segment, as it
begins with the clean latents of the one before.

Tensor legend: B batch, C latent channels, F latent frames, H, W latent height and width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from runtime.checkpoint.folder import Checkpoints
from runtime.errors import CancelledError
from runtime.parallel.ranks import Ranks
from runtime.sampling.commands import Commands
from runtime.sampling.coordinator import Coordinator, Deadline
from runtime.sampling.denoise import Denoising, StepRecord, denoise
from runtime.sampling.plan import Generation, Plan, Prepared, Segment
from runtime.sampling.resume import DenoisingState, Resumable

OnStep = Callable[[StepRecord], None]


def denoise_segments(
    ranks: Ranks,
    prepared: Prepared,
    generation: Generation,
    on_step: OnStep = lambda _: None,
    checkpoints: Checkpoints | None = None,
    commands: Commands | None = None,
) -> torch.Tensor:
    """Denoise all segments to clean latents `[B, C, F, H, W]`.

    The latents are float32, normalised per channel, the same on every rank.

    Args:
        ranks: all ranks of the group.
        prepared: the plan, ready on this rank.
        generation: record to which steps and errors are added.
        on_step: called after every step; steps are numbered through all segments.
        checkpoints: folder and options of checkpoints; None for none.
        commands: commands given on this rank. One that arrives between two segments is seen by the next.

    Raises:
        CancelledError, JobFailedError, RankFailedError: see `Engine.generate`.
    """
    plan, commands = prepared.plan, commands or Commands()
    identity = prepared.recipe.latents.text
    video_BCFHW: torch.Tensor | None = None
    for number in range(plan.segments):
        segment = prepared.segment(number, video_BCFHW)
        coordinator = _coordinate(plan, identity, ranks, commands)
        latents_BCFHW = _denoise_one(
            ranks, plan, segment, coordinator, identity, generation, on_step, checkpoints
        )
        video_BCFHW = segment.follow(video_BCFHW, latents_BCFHW)
        # A segment is a function of the one before, whose decisions its digest proves.
        identity = f"{identity}\nafter {coordinator.digest}"
    assert video_BCFHW is not None
    if plan.segments == 1:
        generation.expectation = plan.expectation(coordinator)
    generation.windows = len(plan.windows)
    return video_BCFHW


def _coordinate(plan: Plan, identity: str, ranks: Ranks, commands: Commands) -> Coordinator:
    """Make the coordinator of one segment; segments share the time until the deadline equally."""
    deadline = None
    if plan.request.deadline is not None:
        deadline = Deadline(plan.request.deadline / plan.segments, plan.kinds[: plan.steps])
    schedules = plan.fresh_schedules()
    return Coordinator(schedules, identity, ranks, deadline, commands, plan.course, plan.forced)


def _denoise_one(
    ranks: Ranks,
    plan: Plan,
    segment: Segment,
    coordinator: Coordinator,
    identity: str,
    generation: Generation,
    on_step: OnStep,
    checkpoints: Checkpoints | None,
) -> torch.Tensor:
    """Denoise one segment, and return its latents."""
    state, sampler = Denoising(segment.noise_BCFHW), plan.fresh_sampler()
    done: list[StepRecord] = []
    progress = DenoisingState(state, sampler, segment.stream, coordinator, done)
    resumable = Resumable(progress, checkpoints, identity, plan.topology, ranks)
    start, before = resumable.begin(), len(generation.steps)
    try:
        for record in denoise(state, sampler, segment.stream, coordinator, ranks, start):
            done.append(record)
            resumable.after(record)
            on_step(replace(record, index=before + record.index))
    except CancelledError:
        resumable.finish()
        raise
    except BaseException:
        resumable.abandon()
        raise
    generation.checkpoint_bytes += resumable.finish()
    sent = [step.sent for step in done]
    own = {
        "sent": sent,
        "bytes": segment.stream.bytes,
        "kept": segment.stream.kept,
        "digest": coordinator.digest,
    }
    generation.add(done, coordinator, ranks.control.all_gather_object(own), start)
    return state.latents_BCFHW
