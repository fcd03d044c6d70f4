"""Generation: the schedule and the histories of one transformer, from a pipeline's first step to its last."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from spectrum.diffusers.branch import Branch
from spectrum.diffusers.call import Call
from spectrum.diffusers.presets import Preset
from spectrum.forecaster import Squares
from spectrum.predictor import Predictor
from spectrum.schedule import AdaptiveSchedule, FixedSchedule, Schedule, StepKind
from spectrum.track import Track

MOST_CALLS = 4
"""Calls of a transformer in one step with one context; more are not a pipeline's, and are only computed."""

Reduce = Callable[[torch.Tensor], object]
"""Adds up a tensor over the ranks of a group, in place, as `torch.distributed.all_reduce` does."""


@dataclass(slots=True)
class Counts:
    """What a generation has done so far; see `Report`."""

    computed: list[int] = field(default_factory=list)
    forecast: list[int] = field(default_factory=list)
    evaluations: int = 0
    forecasts: int = 0
    restarts: int = 0
    errors: dict[int, list[Squares]] = field(default_factory=dict)
    bytes: int = 0


class Turn:
    """What is to be done in one call of the transformer.

    Attributes:
        branch: the branch of the call; None if nothing will be forecast from it.
        forecasts: whether the call is forecast.
        records: whether a computed value is still to be recorded.
    """

    def __init__(self, generation: Generation, branch: Branch | None, step: int, *, forecasts: bool):
        self._generation, self.branch, self._step = generation, branch, step
        self.forecasts, self.records = forecasts, branch is not None and not forecasts

    def withdraw(self) -> None:
        """Take a forecast back, because the call is none of this generation."""
        self._generation.counts.forecasts -= 1

    def value(self) -> torch.Tensor:
        """Forecast the value of this call."""
        assert self.branch is not None
        value = self.branch.track.advance(self._step, StepKind.FORECAST, _nothing).value
        self._generation.used(self.branch)
        return value

    def record(self, value: torch.Tensor) -> None:
        """Remember a copy of what was computed: the pipeline, or a CUDA graph, may write to `value` later."""
        assert self.branch is not None
        advanced = self.branch.track.advance(self._step, StepKind.COMPUTE, value.detach().clone)
        self.records = False
        self._generation.recorded(advanced.squares)
        self._generation.used(self.branch)


def _nothing() -> torch.Tensor:
    raise AssertionError("a forecast computes nothing")


class Generation:
    """One generation of one transformer.

    Steps are the sampler's; a schedule counts from the first one that is seen here.

    Args:
        preset: schedule, predictor and stream.
        total: length of the sampler's list of timesteps.
        begin: index of the first step in it; None if it is known only at the second.
        storage: device on which values are kept; by default where they are computed.
        reduce: adds up errors over ranks, for schedules that depend on them.
    """

    def __init__(
        self,
        preset: Preset,
        total: int,
        begin: int | None,
        storage: torch.device | None = None,
        reduce: Reduce | None = None,
    ):
        self._preset, self._storage, self._reduce = preset, storage, reduce
        self.total, self._begin = total, begin
        self._predictor = _Resizable(preset.predictor, self.steps)
        self._made: Schedule | None = None
        self._branches: dict[tuple[str | None, int], Branch] = {}
        self._index: int | None = None  # step under way
        self._kind = StepKind.COMPUTE
        self._served: dict[str | None, int] = {}  # context → calls in this step
        self.counts = Counts()

    @property
    def index(self) -> int | None:
        """Index of the step under way; None before the first."""
        return self._index

    @property
    def steps(self) -> int:
        """Number of steps, as far as is known."""
        return self.total - (self._begin or 0)

    def turn(self, call: Call, index: int | None) -> Turn | None:
        """Decide what is done in a call.

        Args:
            call: the call.
            index: its step; None while the scheduler has not said where it begins.

        Returns:
            None if the call has no place in this generation: it is to be computed.

        Raises:
            ValueError: the preset does not fit the number of steps.
        """
        if self._index is None or (index is not None and index != self._index):
            self._start_step(index)
        ordinal = self._served.get(call.context, 0)
        if ordinal >= MOST_CALLS:
            return None
        self._served[call.context] = ordinal + 1
        branch = self._branch_of(call, ordinal) if self._step <= self._last_forecast else None
        forecasts = self._kind is StepKind.FORECAST and branch is not None and bool(branch.track.steps)
        self.counts.evaluations += not forecasts
        self.counts.forecasts += forecasts
        return Turn(self, branch, self._step, forecasts=forecasts)

    def recorded(self, squares: Squares | None) -> None:
        """Take note of the error of a forecast that was not needed, and of the memory taken."""
        assert self._index is not None
        if squares is not None:
            self.counts.errors.setdefault(self._index, []).append(squares)
        self.counts.bytes = max(self.counts.bytes, self.bytes)

    def used(self, branch: Branch) -> None:
        """Give up the history of a branch for which no forecast will follow."""
        if self._step >= self._last_forecast:
            self._branches = {key: one for key, one in self._branches.items() if one is not branch}

    @property
    def bytes(self) -> int:
        """Memory that the histories take now, in bytes."""
        return sum(one.track.bytes for one in self._branches.values())

    def errors(self) -> dict[int, float]:
        """Relative errors of forecasts at computed steps; waits for the device."""
        read = {index: Squares.total(squares).read() for index, squares in self.counts.errors.items()}
        return {index: math.sqrt(one.error / one.truth) for index, one in read.items() if one.truth > 0.0}

    def release(self) -> None:
        """Give up the histories; the counts stay."""
        self._branches = {}

    def _start_step(self, index: int | None) -> None:
        """Go on to step `index`, and decide its kind."""
        if self._index is not None:
            self._observe()
        if self._begin is None and index is not None:
            first = index if self._index is None else index - 1
            self._begin, self.counts.computed = first, [first] * len(self.counts.computed)
            self._predictor.resize(self.steps)
        self._index, self._served = index or 0, {}
        if self._begin is not None and self._preset.forecasts:
            _ = self._schedule  # a preset that does not fit is refused at the first step
        self._kind = StepKind.COMPUTE if self._step == 0 else self._schedule.kind(self._step)
        (self.counts.computed if self._kind is StepKind.COMPUTE else self.counts.forecast).append(self._index)
        if self._step > self._last_forecast:
            self.release()

    @property
    def _step(self) -> int:
        """Step of the schedule under way."""
        return (self._index or 0) - (self._begin or 0)

    @property
    def _schedule(self) -> Schedule:
        """The schedule; made once the number of steps is certain."""
        if self._made is None:
            try:
                self._made = self._preset.schedule(self.steps)
            except ValueError as error:
                raise ValueError(
                    f"preset {self._preset.name} does not fit {self.steps} steps: {error}"
                ) from None
        return self._made

    @property
    def _last_forecast(self) -> int:
        """Last step that can be forecast; −1 if none can."""
        if not self._preset.forecasts:
            return -1
        if self._begin is None or not isinstance(self._schedule, FixedSchedule):
            return self.steps - 1
        return max(set(range(self._schedule.steps)) - set(self._schedule.computed), default=-1)

    def _branch_of(self, call: Call, ordinal: int) -> Branch:
        key = call.context, ordinal
        branch = self._branches.get(key)
        if branch is None or not branch.continued_by(call):
            self.counts.restarts += branch is not None
            branch = self._branches[key] = Branch(Track(self._predictor, self._storage), call)
        return branch

    def _observe(self) -> None:
        """Tell a schedule that depends on errors those of the step that has ended."""
        squares = self.counts.errors.get(self._index or 0)
        if not squares or not isinstance(self._schedule, AdaptiveSchedule):
            return
        total = Squares.total(squares)
        sums = torch.stack([total.error, total.truth])
        if self._reduce is not None:
            self._reduce(sums)
        error, truth = sums.tolist()
        self._schedule.observe(self._step, math.sqrt(error / truth) if truth > 0.0 else 0.0)


class _Resizable:
    """Predictor of a generation whose number of steps is certain only at its second step."""

    def __init__(self, make: Callable[[int], Predictor], steps: int):
        self._make, self._predictor = make, make(steps)

    def resize(self, steps: int) -> None:
        self._predictor = self._make(steps)

    @property
    def memory(self) -> int | None:
        return self._predictor.memory

    def weights(self, history: Sequence[int], target: int) -> NDArray[np.float64]:
        return self._predictor.weights(history, target)
