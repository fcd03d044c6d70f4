"""Builds a job from command-line options, checked before anything starts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.shell.defaults import usual_timeout
from runtime.checkpoint.folder import Checkpoints
from runtime.errors import BadRequestError
from runtime.files.checks import check_apart
from runtime.forecasting.presets import load_preset
from runtime.jobs.job import Job
from runtime.models.folder import find_local
from runtime.parallel.topology import Degrees, Topology
from runtime.profile import check_loras
from runtime.request.config import Config, Lora, is_path, load_config
from runtime.request.outputs import Outputs
from runtime.request.video_request import VideoRequest


def build_job(
    *,
    config: str,
    prompt: str,
    out: Path,
    report: Path | None,
    overwrite: bool,
    compare: bool,
    ranks: int | None,
    ulysses: int | None,
    ring: int | None,
    cfg: int | None,
    attention: str | None,
    shard: bool | None,
    compile: bool | None,
    lora: Sequence[tuple[str, float]],
    timeout: float | None,
    busy_timeout: float | None,
    checkpoints: Path | None,
    checkpoint_every: int,
    resume: bool,
    **given: Any,
) -> Job:
    """Build the job that the options describe.

    Raises:
        BadRequestError: a field is out of bounds, or options contradict each other.
    """
    settings = _override(
        load_config(config),
        attention=attention,
        shard=shard,
        compile=compile,
        lora=lora,
        busy_timeout=busy_timeout,
    )
    request = build_request(settings, prompt, **given)
    load_preset(request.spectrum).check_request(settings.windowed(request))
    degrees = Degrees(cfg=cfg, ring=ring, ulysses=ulysses)
    world = ranks or (degrees.product if degrees != Degrees() else None)
    if world is not None and settings.architecture is not None:
        heads = settings.architecture.heads
        topology = Topology.choose(world, heads=heads, guided=request.guided, wanted=degrees)
        topology.check(heads=heads, tokens=None, guided=request.guided)
    default = usual_timeout(settings.compile)
    outputs = Outputs.named(out, report, overwrite=overwrite)
    check_apart(outputs.all(request.videos), inputs_of(config, settings, request))
    kept = None
    if checkpoint_every:
        folder = Checkpoints.folder_of(out, checkpoints)
        kept = Checkpoints(folder, every=checkpoint_every, resume=resume, overwrite=overwrite and not resume)
    if resume and kept is None:
        raise BadRequestError(
            "resume: without checkpoints (--checkpoint-every 0) there is nothing to resume from"
        )
    return Job(settings, request, outputs, compare, world, degrees, kept, timeout or default)


def inputs_of(config: str, settings: Config, request: VideoRequest) -> dict[Path, str]:
    """Input files and folders of a request on this machine → the field that names each."""
    model = find_local(settings)
    named = {
        "config": config if is_path(config) else None,
        "spectrum": request.spectrum if is_path(request.spectrum) else None,
        "image": request.image,
        "model": None if model is None else str(model),
    }
    files = {Path(name): field for field, name in named.items() if name is not None}
    return files | {Path(one.file): "lora" for one in settings.lora}


def _override(
    config: Config,
    *,
    attention: str | None,
    shard: bool | None,
    compile: bool | None,
    lora: Sequence[tuple[str, float]],
    busy_timeout: float | None,
) -> Config:
    """Return the config with the fields that the command line overrides."""
    changes: dict[str, Any] = {}
    if lora:
        changes["lora"] = tuple(Lora(file=str(Path(file).absolute()), scale=scale) for file, scale in lora)
    if attention is not None:
        changes["attention"] = attention
    if compile is not None:
        changes["compile"] = compile
    if busy_timeout is not None:
        changes["busy_timeout"] = busy_timeout
    if shard is not None:
        changes["memory"] = config.memory.model_copy(
            update={"transformer": "shard" if shard else "replicate"}
        )
    settings = config.model_copy(update=changes)
    check_loras(settings)
    return settings


def build_request(config: Config, prompt: str, **given: Any) -> VideoRequest:
    """Build a request from options over the config's defaults; `None` means not given.

    Raises:
        BadRequestError: a field is out of bounds.
    """
    size = given.pop("size", None)
    if size is not None:
        given["width"], given["height"] = size
    return config.request(prompt, **{name: value for name, value in given.items() if value is not None})
