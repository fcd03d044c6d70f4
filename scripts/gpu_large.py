"""Checks of the published models' shapes with random weights: loading, memory, steps, faster evaluations.

Tensor legend: B batch, C latent channels, F latent frames, H, W latent height and width, T text tokens, E
channels of the text encoder.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_bench import Bench, Found, measure_generation, steps_of
from gpu_weights import random_model

from runtime.engine import Engine
from runtime.forecasting.presets import Preset
from runtime.models.quantization import quantize_linears
from runtime.models.wan.adapter import every_block
from runtime.models.wan.projections import fuse_projections
from runtime.models.wan.vae import decode_frames
from runtime.request.config import Config, load_config
from runtime.request.memory import Memory
from runtime.request.video_request import VideoRequest
from runtime.sampling.result import Result
from runtime.sampling.segments import denoise_segments

CONFIGS = ("wan2.1-t2v-1.3b-480p", "wan2.1-t2v-14b-480p", "wan2.1-t2v-14b-720p")
EXPERTS = "wan2.2-t2v-14b-480p"
STEPS = 3
PRESET_FILE = Path(__file__).with_name("gpu_preset.yaml")
OFF = Preset.model_validate({"schedule": {"kind": "full"}})
SMALL = {"width": 64, "height": 48, "frames": 5}


def request_of(config: Config, bench: Bench, **fields: Any) -> VideoRequest:
    return config.request("a wide river at dawn", seed=0, **(SMALL if bench.small else {}), **fields)


def config_of(bench: Bench, name: str, *, small: bool = False) -> Config:
    """Config of a model with random weights, which are written if they are not there.

    Args:
        small: whether to take a model of two blocks, on a GPU, too.
    """
    small = small or bench.small
    config = load_config(name)
    assert isinstance(config.model, str)
    folder = bench.work / (config.model.replace("/", "--") + "-small" * small)
    random_model(config.model, folder, bench.device, small=small)
    changes: dict[str, Any] = {"model": str(folder), "device": str(bench.device), "decode": "tiles"}
    return config.model_copy(update=changes | ({"architecture": None} if small else {}))


@contextmanager
def loaded(bench: Bench, config: Config, found: Found) -> Iterator[Engine]:
    """Load an engine, and free what it held at the end; adds the time and the peak of loading."""
    bench.forget_peak()
    engine = Engine(config)
    bench.synchronize()
    found |= {"load_seconds": engine.load_seconds, "load_peak": bench.peak()}
    try:
        yield engine
    finally:
        engine.__dict__.clear()  # tracebacks of failed checks may still know the engine
        torch.compiler.reset()  # and compiled code its weights
        bench.forget_peak()


def check_model(bench: Bench, name: str) -> Found:
    """Measure one config's model: loading, phases, peaks, a computed and a forecast step, decoding."""
    started = time.perf_counter()
    config = config_of(bench, name)
    found: Found = {"config": name, "write_seconds": time.perf_counter() - started}
    request = request_of(config, bench, steps=STEPS, spectrum=str(PRESET_FILE))
    found["request"] = request.model_dump(mode="json", include={"width", "height", "frames", "steps"})
    with loaded(bench, config, found) as engine:
        found |= measure_generation(bench, engine, request)
        found["whole decoding"] = _decoding(bench, engine, request)
        short = request_of(config, bench, steps=1, guidance=1.0)
        found["kernels"] = [] if name == CONFIGS[-1] else bench.kernels(partial(_denoised, engine, short))
    return found


def _decoding(bench: Bench, engine: Engine, request: VideoRequest) -> Found:
    """Decode without tiles."""
    latents_BCFHW = torch.randn(engine.sizes.shape(request), device=bench.device)
    bench.forget_peak()
    held, started = torch.cuda.memory_allocated(bench.device) if bench.on_gpu else 0, time.perf_counter()
    try:
        with engine.loaded.decoder.at_work() as vae:  # type: ignore[attr-defined]
            for _ in decode_frames(vae, latents_BCFHW):
                pass
        bench.synchronize()
    except torch.OutOfMemoryError as error:
        return {"failed": str(error)[:200]}
    return {"seconds": time.perf_counter() - started, "peak": bench.peak() - held}


def check_evaluations(bench: Bench, name: str) -> Found:
    """Time one branch's computed step: diffusers' own forward, then Lockstep with option upon option."""
    config, found = config_of(bench, name), Found()
    request = request_of(config, bench, steps=3, guidance=1.0)
    rows: list[Found] = []
    found |= {"config": name, "lines": rows}
    with loaded(bench, config, found) as engine:
        rows.append({"line": "diffusers", "computed_step_seconds": _own_forward(bench, engine, request)})
        blocks = every_block(engine.loaded.experts[0].module)  # type: ignore[arg-type]
        exact = _line(bench, engine, request, "exact", rows)
        for block in blocks:
            fuse_projections(block)
        _line(bench, engine, request, "and fused projections", rows, exact)
        for block in blocks:
            block.compile()
        _line(bench, engine, request, "and compiled blocks", rows, exact)
        torch.compiler.reset()
        for block in blocks:
            quantize_linears(block, "fp8")
        _line(bench, engine, request, "and fp8 linears", rows, exact)
    return found


def check_places(bench: Bench) -> Found:
    """Compare weights that come to the device when they are needed with those that stay there."""
    large = config_of(bench, CONFIGS[0])
    experts = config_of(bench, EXPERTS, small=True)
    rows: list[Found] = []
    for name, config, request, ways in (
        (CONFIGS[0], large, request_of(large, bench, steps=3, guidance=1.0), ({"transformer": "offload"},)),
        (
            f"{EXPERTS}, two blocks",
            experts,
            experts.request("a wide river at dawn", seed=0, steps=6, **SMALL),
            ({"experts": "swap"}, {"transformer": "offload"}),
        ),
    ):
        exact: torch.Tensor | None = None
        for places in ({}, *ways):
            memory = Memory.model_validate({"text_encoder": "free", **places})
            found: Found = {}
            with loaded(bench, config.model_copy(update={"memory": memory}), found) as engine:
                written = ", ".join(f"{key}: {value}" for key, value in places.items()) or "on the device"
                latents_BCFHW = _line(bench, engine, request, f"{name}: {written}", rows, exact)
            if latents_BCFHW is not None:
                rows[-1]["equal"] = exact is None or bool(torch.equal(latents_BCFHW, exact))
                rows[-1]["load_peak"] = found["load_peak"]
                exact = latents_BCFHW if exact is None else exact
    return {"lines": rows}


def _denoised(engine: Engine, request: VideoRequest) -> tuple[Result, torch.Tensor]:
    plan = engine.plan(request, OFF)
    result = Result(plan)
    with engine.commanded() as commands:
        latents_BCFHW = denoise_segments(engine.ranks, engine.prepare(plan), result, commands=commands)
    return result, latents_BCFHW


def _line(
    bench: Bench,
    engine: Engine,
    request: VideoRequest,
    name: str,
    rows: list[Found],
    reference: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Measure the steps of an option, and how far its latents are from those of the reference."""
    row: Found = {"line": name}
    rows.append(row)
    bench.forget_peak()
    try:
        result, latents_BCFHW = _denoised(engine, request)
    except Exception as error:  # one option that fails says nothing of the others
        row["failed"] = f"{type(error).__name__}: {error}"[:400]
        return None
    wanted = ("attention", "first_step_seconds", "computed_step_seconds")
    row |= {key: value for key, value in steps_of(result).items() if key in wanted}
    row["peak"] = bench.peak()
    if reference is not None:
        row["error"] = float((latents_BCFHW - reference).norm() / reference.norm())
    return latents_BCFHW


@torch.no_grad()
def _own_forward(bench: Bench, engine: Engine, request: VideoRequest) -> float:
    """Seconds of the transformer's own forward in diffusers, for one branch."""
    expert = engine.loaded.experts[0]
    model: Any = expert.module
    expert.attention.restore()
    dtype, width = engine.loaded.dtype, model.config.text_dim
    latents_BCFHW = torch.randn(engine.sizes.shape(request), device=bench.device, dtype=dtype)
    text_BTE = torch.randn(1, request.max_sequence_length, width, device=bench.device, dtype=dtype)
    timestep = torch.full((1,), 500.0, device=bench.device)
    return bench.seconds(lambda: model(latents_BCFHW, timestep, text_BTE, return_dict=False), rounds=2)


CHECKS: dict[str, Callable[[Bench], Found]] = {
    "places": check_places,
    **{f"model {name}": partial(check_model, name=name) for name in CONFIGS},
    **{f"evaluations {name}": partial(check_evaluations, name=name) for name in CONFIGS[:2]},
}
