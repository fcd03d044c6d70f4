"""Jobs for the launchers, as the command line would make them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launch.jobs import Job, build_job

PROMPT = "a red circle moving left on a black background"
_LEFT_OUT = (
    "report", "ulysses", "ring", "cfg", "attention", "shard", "compile", "lora", "checkpoints", "ranks",
    "busy_timeout",
)  # fmt: skip
TINY = {"size": (64, 48), "frames": 5, "max_sequence_length": 32, "steps": 4}


def make_job(out: Path, **options: Any) -> Job:
    """A job of wan-tiny that writes `out`; options as of `build_job`."""
    given: dict[str, Any] = dict.fromkeys(_LEFT_OUT) | {
        "config": "wan-tiny",
        "prompt": PROMPT,
        "overwrite": False,
        "compare": False,
        "timeout": 5.0,
        "checkpoint_every": 1,
        "resume": False,
        "spectrum": "paper",
    }
    return build_job(out=out, **{**given, **options})
