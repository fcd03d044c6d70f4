"""Session: what a hook decides with, from `enable` to `disable`: the generations of one transformer."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from spectrum.diffusers.call import Call
from spectrum.diffusers.clock import Clock
from spectrum.diffusers.conditions import noise_levels
from spectrum.diffusers.counter import Counter
from spectrum.diffusers.generation import Generation, Reduce, Turn
from spectrum.diffusers.presets import Preset
from spectrum.diffusers.report import Report
from spectrum.diffusers.samplers import Samplers, Sight

_log = logging.getLogger(__name__)
_SKIPPED = 1  # entries that a step may take in a scheduler's list of timesteps beyond its own


@dataclass(slots=True)
class _Progress:
    """A generation under way; `clock` and `timesteps`, its list, are those of a scheduler.

    `is_over` is set once a call has come that cannot belong to it.
    """

    generation: Generation
    counter: Counter
    clock: Clock | None = None
    timesteps: torch.Tensor | None = None
    is_over: bool = False

    def find(self, call: Call) -> int:
        """Find the step of a call by its timestep, or else count it; some schedulers have a step twice."""
        assert self.clock is not None
        now = self.generation.index
        index = self.clock.find(call, now or 0)
        if index is None:
            index = self.counter.count(call) if self.clock.is_blind else -1
        if now is not None and not now <= index <= now + _SKIPPED + 1:
            self.is_over = True
        return index


class Session:
    """Decides for one transformer, or for several that go on with each other's history.

    Attributes:
        preset: schedule, predictor and stream.
        samplers: schedulers of the pipelines that it decides for.
        siblings: sessions of the pipeline's other transformers.
        lock: held during a call of the transformer.

    Args:
        preset: schedule, predictor and stream.
        steps: number of steps where no pipeline is known; None if one is.
        storage: device on which histories are kept; by default where they are computed.
        reduce: adds up errors over ranks.
    """

    def __init__(
        self, preset: Preset, steps: int | None, storage: torch.device | None, reduce: Reduce | None
    ):
        self.preset, self._steps, self._storage, self._reduce = preset, steps, storage, reduce
        self.samplers = Samplers()
        self.siblings: list[Session] = []
        self.lock = threading.RLock()
        self._under_way: dict[int | None, _Progress] = {}  # id of a scheduler, or None → its generation
        self._latest: Generation | None = None
        self._unknown = 0
        self._with_gradient = False  # whether there were calls whose gradients are wanted

    def turn(self, module: torch.nn.Module, args: Any, kwargs: Any, context: Any) -> Turn | None:
        """Decide what is done in a call of `module`; None if it is to be computed, and nothing more.

        Raises:
            ValueError: the generation is longer than was said, or the preset does not fit it.
            TypeError: `module` does not take these arguments.
        """
        call = Call.of(module, args, kwargs, context)
        if torch.is_grad_enabled() and _has_gradient(module, args, kwargs):
            if not self._with_gradient:
                _log.warning(
                    "calls of %s with gradients are computed, because a forecast has no gradient; "
                    "to forecast, call it within torch.no_grad()",
                    type(module).__name__,
                )
            self._with_gradient = True
            return None
        if self._steps is not None:
            return self._counted(call)
        sight = self.samplers.calling(functools.partial(self._goes_on, call))
        turn = None if sight is None else self._told(call, sight)
        if turn is None:
            if not self._unknown:
                _log.warning(
                    "a call of %s is computed, because no enabled pipeline is at a step that needs it; "
                    "call enable() with every pipeline that uses this transformer",
                    type(module).__name__,
                )
            self._unknown += 1
        return turn

    def forget(self) -> None:
        """Give up what is under way; the next call begins anew."""
        for progress in self._under_way.values():
            progress.generation.release()
        self._under_way = {}

    def report(self) -> Report:
        """Report the latest generation; waits for the device."""
        generation = self._latest
        if generation is None:
            return Report(self.preset.name, self.preset.stream, unknown=self._unknown)
        counts = generation.counts
        return Report(
            self.preset.name,
            self.preset.stream,
            generation.steps,
            tuple(counts.computed),
            tuple(counts.forecast),
            counts.evaluations,
            counts.forecasts,
            counts.restarts,
            self._unknown,
            generation.errors(),
            counts.bytes,
        )

    def _goes_on(self, call: Call, sight: Sight, begun: Iterable[Sight]) -> bool:
        """Whether `call` has the timestep of the generation at `sight`, and of none that has begun."""
        progress = self._under_way.get(id(sight.scheduler))
        if progress is None or progress.clock is None or progress.timesteps is not sight.timesteps:
            return False
        clock = progress.clock
        return clock.shows(call, sight.timestep) and not any(clock.shows(call, one.timestep) for one in begun)

    def _told(self, call: Call, sight: Sight) -> Turn | None:
        """Decide with what a scheduler tells."""
        progress = self._under_way.get(id(sight.scheduler))
        if progress is None or progress.timesteps is not sight.timesteps or _went_back(progress, sight):
            clock = Clock(sight.timesteps, sight.range)
            begin = sight.index if sight.counts else clock.find(call) or 0
            preset = self.preset.at(functools.partial(noise_levels, sight.scheduler))
            progress = self._begin(id(sight.scheduler), len(sight.timesteps), begin, preset)
            progress.timesteps, progress.clock = sight.timesteps, clock
            self._check(progress.generation, call, sight)
        assert progress.clock is not None
        index = sight.index if sight.counts else progress.find(call)
        if progress.is_over:
            return None
        if index is None:
            return progress.generation.turn(call, index)
        if index >= progress.generation.total:
            return None
        progress.clock.learn(call, index)
        turn = progress.generation.turn(call, index)
        if turn is not None and turn.forecasts and not progress.clock.agrees(call, index):
            turn.withdraw()
            return None
        return turn

    def _check(self, generation: Generation, call: Call, sight: Sight) -> None:
        """Refuse a generation that the preset is not valid for."""
        conditions, pipeline = self.preset.conditions, None if sight.of is None else sight.of()
        if conditions is not None and pipeline is not None:
            conditions.check_generation(pipeline, generation.steps, call.size)

    def _counted(self, call: Call) -> Turn | None:
        """Decide with what was counted, where no scheduler is known."""
        assert self._steps is not None
        progress = self._under_way.get(None)
        if progress is None or not progress.counter.continued_by(call):
            progress = self._begin(None, call.total or self._steps, call.step or 0, self.preset)
        index = progress.counter.count(call)
        if index >= progress.generation.total:
            raise ValueError(
                f"steps: {self._steps} given to enable(), but the generation has more steps; "
                f"give the number of times that the sampler calls the transformer for one prompt"
            )
        return progress.generation.turn(call, index)

    def _begin(self, key: int | None, total: int, begin: int | None, preset: Preset) -> _Progress:
        if (before := self._under_way.get(key)) is not None:
            before.generation.release()
        if begin:  # an expert that takes over: the one before is done
            _forget(self.siblings)
        self._latest = Generation(preset, total, begin, self._storage, self._reduce)
        self._under_way[key] = _Progress(self._latest, Counter())
        return self._under_way[key]


def _forget(sessions: Iterable[Session]) -> None:
    for session in sessions:
        session.forget()


def _has_gradient(module: torch.nn.Module, args: Any, kwargs: Any) -> bool:
    given = (one for one in (*args, *kwargs.values(), *module.parameters()) if isinstance(one, torch.Tensor))
    return any(one.requires_grad for one in given)


def _went_back(progress: _Progress, sight: Sight) -> bool:
    index = progress.generation.index
    return sight.counts and sight.index is not None and index is not None and sight.index < index
