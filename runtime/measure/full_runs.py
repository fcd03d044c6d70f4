"""Full runs of a calibration, and the nudged runs that branch off them.

Tensor legend: n sampler steps; C, F, H, W latent channels, frames, height and width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import SchedulerMixin

from runtime.measure.probes import GramStream, NudgedStream
from runtime.measure.session import Session
from runtime.measure.states import StateFiles
from runtime.sampling.denoise import Denoising, StepRecord
from runtime.sampling.run import Run
from spectrum import Gram
from spectrum.calibration import Findings, Measured, norm, nudged_steps, sample


@dataclass(frozen=True, slots=True)
class _Before:
    """State of a full run just before one of its steps."""

    step: int
    latents_BCFHW: torch.Tensor
    sampler: SchedulerMixin
    velocity_BCFHW: torch.Tensor  # velocity of the step before


@dataclass(frozen=True, slots=True)
class _After:
    """Latents with which a full run's step began, and its velocity."""

    latents_BCFHW: torch.Tensor
    velocity_BCFHW: torch.Tensor


class FullRuns:
    """Makes the videos by the full sampler, and measures them.

    Args:
        session: the videos.
        levels: σ of the sampler, `[n + 1]`.
        states: where all states are written on the first rank; None to write none.
    """

    def __init__(self, session: Session, levels: list[float], states: StateFiles | None):
        self._session, self._levels, self._states = session, levels, states

    def nudged_steps(self, video: int) -> list[int]:
        """Steps at which `video` is nudged."""
        return nudged_steps(video, self._session.steps)

    def make(self, video: int, found: Findings) -> None:
        """Make one full run with its nudged runs, and add what is found to `found`."""
        session, name = self._session, f"video {video + 1} of {self._session.videos}"
        run, nudged = session.prepare(video), self.nudged_steps(video)
        stream = GramStream(run.network, run.noise_BCFHW, is_leader=session.ranks.is_leader)
        before: list[_Before] = []
        after: dict[int, _After] = {}
        state = session.denoising(run, stream, name)
        came_BCFHW = state.latents_BCFHW
        for record in self._written(video, state, name):
            assert stream.last_BCFHW is not None
            found.computed.append(record.seconds)
            if record.index - 1 in nudged:
                after[record.index - 1] = _After(came_BCFHW, stream.last_BCFHW)
            if record.index + 1 in nudged:
                kept = state.latents_BCFHW.clone(), copy.deepcopy(state.sampler), stream.last_BCFHW
                before.append(_Before(record.index + 1, *kept))
            came_BCFHW = state.latents_BCFHW
        self._nudge_all(run, before, after, state.latents_BCFHW, name, found)
        self._note(stream, state.latents_BCFHW, found)

    def repeat(self, video: int, found: Findings, known: Measured) -> None:
        """Make one full run again, for its states, and add what is `known` of all runs to `found`."""
        session, name = self._session, f"video {video + 1} of {self._session.videos}"
        run = session.prepare(video)
        state = session.denoising(run, run.open_stream(), name)
        found.computed += [record.seconds for record in self._written(video, state, name)]
        found.repeat_run(known)
        found.latents.append(state.latents_BCFHW.cpu())

    def restore_states(self, video: int, run: Run) -> None:
        """Make the states of a full run again."""
        name = f"states of video {video + 1} of {self._session.videos}"
        for _ in self._written(video, self._session.denoising(run, run.open_stream(), name), name):
            pass

    def _written(self, video: int, state: Denoising, name: str) -> Iterator[StepRecord]:
        """Denoise to the end; the first rank writes all states."""
        if self._states is None or not self._session.ranks.is_leader:
            yield from self._session.walk(state, name)
            return
        with self._states.writing(video) as write:
            write(state.latents_BCFHW)
            for record in self._session.walk(state, name):
                write(state.latents_BCFHW)
                yield record

    def _nudge_all(
        self,
        run: Run,
        before: list[_Before],
        after: dict[int, _After],
        final_BCFHW: torch.Tensor,
        name: str,
        found: Findings,
    ) -> None:
        """Make the nudged runs; note sizes of errors at the end, and what they do to the next velocity."""
        for one in before:
            stream = NudgedStream(run.open_stream(), one.step, one.velocity_BCFHW)
            named = f"{name}, nudged at {one.step}"
            state = self._session.denoising(run, stream, named)
            state.latents_BCFHW, state.sampler = one.latents_BCFHW, one.sampler
            for _ in self._session.walk(state, named, one.step):
                pass
            moved = abs(self._levels[one.step] - self._levels[one.step + 1])
            found.add_gain(one.step, norm(state.latents_BCFHW - final_BCFHW), moved * stream.size)
            if one.step in after:
                found.add_response(one.step + 1, *_changes(stream, after[one.step]))

    def _note(self, stream: GramStream, final_BCFHW: torch.Tensor, found: Findings) -> None:
        """Note Gram matrices, their scale and the result."""
        grams = self._sum(stream.grams())
        trajectory = self._sum({"guided": stream.trajectory()})["guided"]
        found.add_run(grams, trajectory, norm(sample(final_BCFHW)))
        found.latents.append(final_BCFHW.cpu())

    def _sum(self, grams: Mapping[str, Gram]) -> dict[str, Gram]:
        """Sum Gram matrices of one size over the ranks, in one reduction."""
        flat = np.concatenate([gram.ravel() for gram in grams.values()])
        parts = np.split(np.asarray(self._session.ranks.control.sum(flat.tolist())), len(grams))
        shape = next(iter(grams.values())).shape
        return {name: part.reshape(shape) for name, part in zip(grams, parts, strict=True)}


def _changes(nudged: NudgedStream, full: _After) -> tuple[float, float]:
    """Changes of the velocity and of the latent that a nudge has caused at the next step."""
    assert nudged.latents_BCFHW is not None and nudged.velocity_BCFHW is not None
    velocity = norm(nudged.velocity_BCFHW - full.velocity_BCFHW)
    return velocity, norm(nudged.latents_BCFHW - full.latents_BCFHW)
