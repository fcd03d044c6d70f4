"""Denoising of one generation, segment by segment, each of which can be interrupted and resumed.

A video from text is one segment, however many windows it has. With an image each window is a segment, as it
begins with the clean latents of the one before; if the video extends another, the first with those of that.

Tensor legend: B batch, C latent channels, F latent frames, H, W latent height and width.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from runtime.checkpoint.folder import Checkpoints
from runtime.errors import CancelledError
from runtime.parallel.ranks import Ranks
from runtime.sampling.commands import Commands
from runtime.sampling.coordinator import Coordinator, Deadline
from runtime.sampling.denoise import Denoising, OnStep, StepRecord, denoise
from runtime.sampling.estimate import OnEstimate, unseen
from runtime.sampling.plan import Plan
from runtime.sampling.result import Result
from runtime.sampling.resume import Resumable
from runtime.sampling.run import Run


def denoise_segments(
    ranks: Ranks,
    run: Run,
    result: Result,
    on_step: OnStep = lambda _: None,
    checkpoints: Checkpoints | None = None,
    commands: Commands | None = None,
    on_estimate: OnEstimate = unseen,
) -> torch.Tensor:
    """Denoise all segments to clean latents `[B, C, F, H, W]`.

    The latents are float32, normalised per channel, the same on every rank.

    Args:
        ranks: all ranks of the group.
        run: the run of the plan on this rank.
        result: record to which steps and errors are added.
        on_step: called after every step; steps are numbered through all segments.
        checkpoints: folder and options of checkpoints; None for none.
        commands: commands given on this rank. One that arrives between two segments is seen by the next.
        on_estimate: given the clean estimate of the current segment, after every computed step.

    Raises:
        CancelledError, JobFailedError, RankFailedError: see `Engine.generate`.
    """
    plan, commands = run.plan, commands or Commands()
    identity = run.recipe.latents.text
    video_BCFHW = run.before_BCFHW
    upcoming = plan.next_computed

    def after(record: StepRecord) -> None:
        following = upcoming[record.index]
        if following is not None:
            run.network.at(following).expect()  # its expert's weights come while steps are forecast
        on_step(record)

    for number in range(plan.segments):
        segment = run.segment(number, video_BCFHW)
        coordinator = _coordinate(plan, identity, ranks, commands)
        state = Denoising(
            segment.noise_BCFHW, segment.sampler, segment.stream, coordinator, segment.known_BCFHW
        )
        resumable = Resumable(state, checkpoints, identity, plan.topology, ranks)
        _denoise_one(resumable, result, ranks, after, on_estimate)
        video_BCFHW = segment.follow(video_BCFHW, state.latents_BCFHW)
        # A segment is a function of the one before, whose decisions its digest proves.
        identity = f"{identity}\nafter {coordinator.digest}"
    assert video_BCFHW is not None
    if plan.segments == 1:
        result.expectation = plan.expectation(coordinator)
    return video_BCFHW


def _coordinate(plan: Plan, identity: str, ranks: Ranks, commands: Commands) -> Coordinator:
    """Make the coordinator of one segment; segments share the time until the deadline equally."""
    deadline = None
    if plan.request.deadline is not None:
        deadline = Deadline(plan.request.deadline / plan.segments, plan.kinds[: plan.steps])
    schedules = plan.fresh_schedules()
    return Coordinator(schedules, identity, ranks, deadline, commands, plan.course, plan.forced)


def _denoise_one(
    resumable: Resumable, result: Result, ranks: Ranks, on_step: OnStep, on_estimate: OnEstimate
) -> None:
    """Denoise one segment, and add what it took to the result."""
    state, before = resumable.state, len(result.steps)
    start = resumable.begin()
    try:
        for record in denoise(state, ranks, start, on_estimate):
            resumable.after(record)
            on_step(replace(record, index=before + record.index))
    except CancelledError:
        resumable.finish()
        raise
    except BaseException:
        resumable.abandon()
        raise
    result.checkpoint_bytes += resumable.finish()
    own = {
        "sent": [dict(step.sent_by_axis) for step in state.steps],
        "bytes": state.stream.bytes,
        "kept": state.stream.kept,
        "digest": state.coordinator.digest,
    }
    result.add(state, ranks.control.all_gather_object(own), start)
