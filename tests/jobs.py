"""Jobs for the launchers, as the command line would make them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from runtime.engine import Engine
from runtime.jobs.job import Job
from runtime.jobs.options import JobOptions
from runtime.request.config import EMBEDDED_MODELS, load_config
from runtime.request.outputs import Outputs
from runtime.request.video_request import VideoRequest

PROMPT = "a red circle moving left on a black background"
TINY = {"width": 64, "height": 48, "frames": 5, "max_sequence_length": 32, "steps": 4}


def make_job(out: Path, **options: Any) -> Job:
    """A job of wan-tiny that writes `out`; options as of `JobOptions`."""
    given = {"prompt": PROMPT, "out": out, "timeout": 5.0, "checkpoint_every": 1, "spectrum": "paper"}
    return JobOptions.parse(**given | options).job()


def job_of(engine: Engine, request: VideoRequest, outputs: Outputs, **given: Any) -> Job:
    """The job of a request on an engine that is loaded; more as of `Job.build`."""
    return Job.build(engine.config, request, outputs, **given)


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
