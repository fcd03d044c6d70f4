"""Defaults of a job. Imports nothing slow."""

from __future__ import annotations

CHECKPOINT_EVERY = 4  # computed steps; what it costs: scripts/bench_checkpoint.py
DEFAULT_TIMEOUT, COMPILE_TIMEOUT = 30.0, 600.0  # seconds; ranks do not compile equally fast


def usual_timeout(compiles: bool) -> float:
    """Default of `--timeout`: seconds within which the failure of one rank ends all of them."""
    return COMPILE_TIMEOUT if compiles else DEFAULT_TIMEOUT
