"""Universal presets: plans and weights for pipelines without a calibration; see `spectrum.universal`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from spectrum.calibrated import CalibratedPredictor
from spectrum.diffusers.presets import Preset
from spectrum.predictor import Predictor
from spectrum.schedule import FixedSchedule, Schedule, paper_schedule
from spectrum.universal import flow_levels, universal_plan, universal_predictor

_Levels = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class UniversalPreset(Preset):
    """A preset that is made for the noise levels of each generation, over all transformers of a pipeline.

    Attributes:
        nfe: number of computed steps; None for as many as the paper's schedule computes.
    """

    nfe: int | None = None

    def __post_init__(self) -> None:
        if self.stream != "velocity":
            raise ValueError(f"stream: {self.stream!r} given; the preset {self.name} needs velocity")

    def at(self, levels: Callable[[], Sequence[float]]) -> Preset:
        known = tuple(levels())
        schedule, predictor = partial(_schedule, self.nfe, known), partial(_predictor, known)
        return replace(self, schedule=schedule, predictor=predictor)


def universal_preset(
    name: str = "universal", nfe: int | None = None, stream: str = "velocity"
) -> UniversalPreset:
    """Make a universal preset.

    Args:
        name: how reports and errors call it.
        nfe: number of computed steps, at least 1; None for as many as the paper's schedule computes.
        stream: forecast quantity, which must be `velocity`.

    Raises:
        ValueError: `nfe` is no number of steps, or the stream another.
    """
    if nfe is not None and (not isinstance(nfe, int) or nfe < 1):
        raise ValueError(f"preset {name}: nfe: {nfe} given; it must be a number of steps, at least 1")
    schedule, predictor = partial(_schedule, nfe, None), partial(_predictor, None)
    return UniversalPreset(name, schedule, predictor, stream, carried=stream == "velocity", nfe=nfe)


def _schedule(nfe: int | None, known: _Levels | None, steps: int) -> Schedule:
    """Plan all steps of the noise levels, and take the last `steps` of them: a generation may begin later."""
    levels = _levels(known, steps)
    whole = len(levels) - 1
    first = whole - steps
    budget = paper_schedule(whole).nfe if nfe is None else min(nfe, whole)
    planned = universal_plan(levels, budget).computed
    return FixedSchedule.explicit(steps, [0, *(step - first for step in planned if step > first)])


def _predictor(known: _Levels | None, steps: int) -> Predictor:
    levels = _levels(known, steps)
    return _Later(universal_predictor(levels), len(levels) - 1 - steps)


def _levels(known: _Levels | None, steps: int) -> _Levels:
    """The scheduler's noise levels; typical ones where it is not known."""
    return known if known is not None and len(known) > steps else flow_levels(steps)


@dataclass(frozen=True, slots=True)
class _Later:
    """A predictor of a generation whose step 0 is step `first` of the noise levels."""

    whole: CalibratedPredictor
    first: int

    @property
    def memory(self) -> int:
        return self.whole.memory

    def weights(self, history: Sequence[int], target: int) -> NDArray[np.float64]:
        return self.whole.weights([step + self.first for step in history], target + self.first)
