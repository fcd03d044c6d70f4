"""Samplers: which pipeline calls the transformer, and at which step it is.

A transformer may serve several pipelines, in turn or interleaved, and a hook of it sees only its arguments. A
pipeline about to call it has just begun a list of timesteps or moved its scheduler by a step; the others have
not. Both can be seen without waiting for an accelerator.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True, eq=False)
class Sight:
    """Where a scheduler stands.

    Attributes:
        scheduler: diffusers' scheduler.
        timesteps: its list of timesteps, which is a new tensor in every generation.
        index: step that comes next; None before the first one if the pipeline did not say where it begins,
            and for schedulers that do not count.
        of: its pipeline.
    """

    scheduler: Any
    timesteps: torch.Tensor
    index: int | None
    of: weakref.ref[Any] | None = None

    def begun(self, before: Sight | None) -> bool:
        """Whether another generation was begun since."""
        return before is None or self.timesteps is not before.timesteps

    def moved(self, before: Sight | None) -> bool:
        """Whether a step was made since, or another generation begun."""
        return before is None or self.begun(before) or self.index != before.index

    @property
    def counts(self) -> bool:
        """Whether the scheduler counts its steps."""
        return hasattr(self.scheduler, "step_index")

    @property
    def range(self) -> float:
        """Number of timesteps of training."""
        return float(getattr(self.scheduler.config, "num_train_timesteps", 1000))

    @property
    def timestep(self) -> float:
        """Timestep that comes next; waits for the device."""
        return float(self.timesteps[self.index or 0])

    @property
    def ended(self) -> bool:
        """Whether every step was made."""
        return self.index is not None and self.index >= len(self.timesteps)


class Samplers:
    """The schedulers of the pipelines that share one transformer."""

    def __init__(self) -> None:
        self._pipelines: list[weakref.ref[Any]] = []
        self._seen: dict[int, Sight] = {}  # by id of a scheduler, which its sight keeps alive
        self._latest: dict[int, int | None] = {}  # thread → id of the scheduler whose pipeline called last

    def add(self, pipeline: Any) -> None:
        """Take note of a pipeline, without keeping it alive; what it did before does not count."""
        if all(known() is not pipeline for known in self._pipelines):
            self._pipelines.append(weakref.ref(pipeline))
        self._seen = self._sights()

    def __bool__(self) -> bool:
        return bool(self._pipelines)

    def calling(self, goes_on: Callable[[Sight, Iterable[Sight]], bool]) -> Sight | None:
        """Return where the pipeline that is calling stands; None if it is none of the known ones.

        Args:
            goes_on: tells whether a pipeline goes on, when others have begun; otherwise it was stopped.
        """
        sights, thread = self._sights(), threading.get_ident()
        latest = self._latest.get(thread)
        moved = {
            key: sight
            for key, sight in sights.items()
            if sight.moved(self._seen.get(key)) and not sight.ended
        }
        begun = {key: sight for key, sight in moved.items() if sight.begun(self._seen.get(key))}
        if begun and latest in moved and latest not in begun and goes_on(moved[latest], begun.values()):
            begun = {}  # by other threads
        candidates = begun or moved
        if latest in candidates:  # the others were stopped after a step, or run in other threads
            candidates = {latest: candidates[latest]}
        if len(candidates) > 1:  # cannot be told apart; after the next step they can
            self._seen, latest = sights, None
        elif candidates:
            ((latest, sight),) = candidates.items()
            self._seen = {key: known for key, known in self._seen.items() if key in sights}
            self._seen[latest] = sight
        self._latest[thread] = latest
        found = None if latest is None else sights.get(latest)
        return None if found is None or found.ended else found

    def _sights(self) -> dict[int, Sight]:
        self._pipelines = [known for known in self._pipelines if known() is not None]
        schedulers = [(getattr(known(), "scheduler", None), known) for known in self._pipelines]
        return {
            id(one): _sight(one, known)
            for one, known in schedulers
            if getattr(one, "timesteps", None) is not None
        }


def _sight(scheduler: Any, pipeline: weakref.ref[Any]) -> Sight:
    index = getattr(scheduler, "step_index", None)
    if index is None:
        index = getattr(scheduler, "begin_index", None)
    return Sight(scheduler, scheduler.timesteps, index, pipeline)
