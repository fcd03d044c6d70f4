"""Universal plans and weights, as presets use them; see `spectrum.universal`.

Legend: n sampler steps.
"""

from __future__ import annotations

import hashlib
from functools import cache, lru_cache

from spectrum import CalibratedPredictor, PlannedSteps, Planner
from spectrum.universal import TABLE, flow_levels, universal

Levels = tuple[float, ...]
"""Noise levels of a sampler, `[n + 1]`."""


def levels_of(steps: int, known: Levels | None) -> Levels:
    """Noise levels of a sampler with `steps` steps; typical ones as long as the sampler is not known."""
    return known if known is not None and len(known) == steps + 1 else flow_levels(steps)


@lru_cache(maxsize=64)
def planned(levels: Levels, fresh: tuple[tuple[int, int], ...], nfe: int) -> PlannedSteps:
    """Plan `nfe` computed steps.

    Args:
        levels: the sampler's noise levels.
        fresh: steps before which the history is dropped, each with the number of steps computed from there.

    Raises:
        ValueError: it cannot be done in so many steps, or there are too many to plan.
    """
    return _planner(levels, fresh).plan(nfe)


@lru_cache(maxsize=16)
def _planner(levels: Levels, fresh: tuple[tuple[int, int], ...]) -> Planner:
    return universal().planner(levels, dict(fresh))


@lru_cache(maxsize=16)
def predictor(levels: Levels) -> CalibratedPredictor:
    """Make the predictor for a sampler with these noise levels."""
    return universal().predictor(levels)


@cache
def digest() -> str:
    """SHA-256, hexadecimal, of the table that plans and weights come from."""
    return hashlib.sha256(TABLE.read_bytes()).hexdigest()
