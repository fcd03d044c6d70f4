"""Prompts of the benches of wan-tiny and wan2.2-tiny, so that no two tables share them by accident.

Each function lists captions in a fixed order, of which a bench takes the first ones.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import cache

import numpy as np
from wan_tiny_data import SCENES

from runtime.forecasting.calibration import load_calibration

FIRST = 24  # of `of_experts` that were taken when the other orders were made
EVALUATED = 48  # of the same order that `evaluate_wan_tiny.py` takes
FITTED, UNIVERSAL = 32, 8


def of_experts() -> list[str]:
    """Prompts of wan2.2-tiny in docs/quality.md, of few steps, and of `evaluate_wan_tiny.py`."""
    return _others(48, ())


def of_fits(calibrated: Collection[str]) -> list[str]:
    """Prompts of docs/fitted.jsonl.

    Args:
        calibrated: prompts of the calibration.
    """
    return _others(2026, {*calibrated, *of_experts()[:FIRST]})


@cache
def of_universal() -> list[str]:
    """Prompts of docs/universal.jsonl."""
    taken = {*of_experts()[:FIRST]}
    for prompts in _calibrated():
        taken |= {*prompts, *of_fits(prompts)[:FITTED]}
    return _others(2028, taken)


def of_progressive() -> list[str]:
    """Prompts of docs/progressive.jsonl: far behind those of docs/universal.jsonl."""
    return of_universal()[100:]


@cache
def of_quality() -> list[str]:
    """Prompts of wan-tiny in docs/quality.md, which no calibration and no other table has."""
    taken = {*of_experts()[:EVALUATED], *of_universal()[:UNIVERSAL]}
    for prompts in _calibrated():
        taken |= {*prompts, *of_fits(prompts)[:FITTED]}
    return _others(2030, taken)


@cache
def of_guidance() -> list[str]:
    """Prompts of docs/adaptive_guidance.jsonl, the first eight of which no other table has."""
    taken = {*of_experts()[:EVALUATED]}
    for prompts in _calibrated():
        taken |= {*prompts, *of_fits(prompts)[: 2 * FITTED]}
    return _others(2027, taken)


def _calibrated() -> list[tuple[str, ...]]:
    return [tuple(load_calibration(model).prompts) for model in ("wan-tiny", "wan2.2-tiny")]


def _others(order: int, taken: Collection[str]) -> list[str]:
    """Captions that are not `taken`, in the order of this seed."""
    numbers = np.random.default_rng(order).permutation(len(SCENES))
    return [caption for number in numbers if (caption := SCENES[number].caption) not in taken]
