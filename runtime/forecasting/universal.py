"""Noise levels and table of universal presets; see `spectrum.universal`.

Legend: n sampler steps.
"""

from __future__ import annotations

import hashlib
from functools import cache

from spectrum.universal import TABLE, flow_levels

Levels = tuple[float, ...]
"""Noise levels of a sampler, `[n + 1]`."""


def levels_of(steps: int, known: Levels | None) -> Levels:
    """Noise levels of a sampler with `steps` steps; typical ones as long as the sampler is not known."""
    return known if known is not None and len(known) == steps + 1 else flow_levels(steps)


@cache
def digest() -> str:
    """SHA-256, hexadecimal, of the table that plans and weights come from."""
    return hashlib.sha256(TABLE.read_bytes()).hexdigest()
