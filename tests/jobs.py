"""Jobs for the launchers, as the command line would make them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from launch.commands.build_job import build_job
from runtime.jobs.job import Job
from runtime.request.config import EMBEDDED_MODELS, load_config

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


def overflowing(folder: Path) -> Path:
    """A config whose model's finite weights overflow in the first step."""
    model, config = folder / "overflowing", folder / "overflowing.yaml"
    shutil.copytree(EMBEDDED_MODELS / "wan-tiny", model)
    path = next((model / "transformer").glob("*.safetensors"))
    weights, name = load_file(path), "blocks.3.ffn.net.0.proj.weight"
    weight = weights[name] = weights[name].float()
    weight[5] = 3e38
    save_file(weights, path, metadata={"format": "pt"})
    tiny = load_config("wan-tiny").model_copy(update={"model": str(model)})
    config.write_text(tiny.model_dump_json(exclude_none=True))
    return config
