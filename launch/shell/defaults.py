"""What a job is given where nothing was said. Nothing here takes time to import."""

from __future__ import annotations

CHECKPOINT_EVERY = 4  # computed steps; what it costs: scripts/bench_checkpoint.py
DEFAULT_TIMEOUT, COMPILE_TIMEOUT = 30.0, 600.0  # seconds; ranks do not compile equally fast


def usual_timeout(compiles: bool) -> float:
    """Seconds within which the failure of one rank ends all, where nothing was said."""
    return COMPILE_TIMEOUT if compiles else DEFAULT_TIMEOUT
