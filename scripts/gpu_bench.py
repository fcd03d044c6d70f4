"""What the checks of `gpu_check.py` share: the machine, its clock, and generations in measured phases."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from runtime.engine import Engine
from runtime.media import quality
from runtime.media.mp4 import FrameBuffer, Frames
from runtime.request.video_request import VideoRequest
from runtime.sampling.result import Result

Found = dict[str, Any]
"""What a check has found, as JSON."""


@dataclass(frozen=True, slots=True)
class Bench:
    """The machine that is checked.

    Attributes:
        device: its first accelerator, or the CPU.
        count: number of accelerators; 0 on a CPU.
        work: folder for random weights and other files that are not kept.
        small: whether models of two blocks stand for the real ones, as on a CPU.
    """

    device: torch.device
    count: int
    work: Path
    small: bool

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def synchronize(self) -> None:
        """Wait until the device has done all its work."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], object], rounds: int = 5) -> float:
        """Median seconds of `work` on the device, after one round that is not counted."""
        times = []
        for _ in range(rounds + 1):
            self.synchronize()
            started = time.perf_counter()
            work()
            self.synchronize()
            times.append(time.perf_counter() - started)
        return statistics.median(times[1:])

    def peak(self) -> int:
        """Most bytes that tensors held on the device since `forget_peak`; 0 on a CPU."""
        return torch.cuda.max_memory_allocated(self.device) if self.on_gpu else 0

    def forget_peak(self) -> None:
        """Free what nobody holds any more, and begin to measure the peak anew."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def kernels(self, work: Callable[[], object], most: int = 12) -> list[Found]:
        """Kernels that took the longest in `work`, with their milliseconds and number; none on a CPU."""
        if not self.on_gpu:
            work()
            return []
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            work()
            self.synchronize()
        ranked = sorted(profiler.key_averages(), key=lambda one: one.self_device_time_total, reverse=True)
        return [
            {"kernel": one.key[:100], "ms": one.self_device_time_total / 1000, "calls": one.count}
            for one in ranked[:most]
            if one.self_device_time_total > 0
        ]


class Counted:
    """Sink that counts frames and keeps none."""

    def __init__(self) -> None:
        self.frames = 0

    def write(self, frames_THW3: Frames) -> None:
        self.frames += len(frames_THW3)


def frames_of(engine: Engine, request: VideoRequest, **given: Any) -> Frames:
    """Generate one video and return its frames `[T, H, W, 3]`, uint8."""
    sink = FrameBuffer()
    engine.generate(request, [sink], **given)
    return sink.frames


def psnr(frames: Frames, other: Frames) -> float | None:
    """Peak signal-to-noise ratio of two videos in dB; None if they are equal."""
    return None if np.array_equal(frames, other) else quality.psnr(frames, other)


def measure_generation(bench: Bench, engine: Engine, request: VideoRequest) -> Found:
    """Generate one video; measure its phases, steps and peaks of memory.

    The first computed step is told apart: it sets up libraries, and compiles where that is wanted.
    """
    plan, peaks = engine.plan(request), {}
    bench.forget_peak()
    started = time.perf_counter()
    engine.prepare(plan)
    bench.synchronize()
    encoding, peaks["encode"] = time.perf_counter() - started, bench.peak()
    bench.forget_peak()

    def on_latents(latents_BCFHW: torch.Tensor) -> None:
        assert latents_BCFHW.isfinite().all()
        peaks["denoise"] = bench.peak()
        bench.forget_peak()

    sink = Counted()
    result = engine.run(plan, [sink], on_latents=on_latents)
    bench.synchronize()
    peaks["decode"] = bench.peak()
    if sink.frames != request.frames:
        raise RuntimeError(f"{sink.frames} frames were decoded, not {request.frames}")
    return {"encode_seconds": encoding, "peaks": peaks, **steps_of(result)}


def steps_of(result: Result) -> Found:
    """Seconds of a result's steps and phases, and the kernel of its self-attention."""
    by_kind: dict[str, list[float]] = {"compute": [], "forecast": []}
    for step in result.steps:
        by_kind[step.kind.value].append(step.seconds)
    first, *later = by_kind["compute"]
    return {
        "attention": result.plan.attention,
        "first_step_seconds": first,
        "computed_step_seconds": statistics.median(later) if later else None,
        "forecast_step_seconds": statistics.median(by_kind["forecast"]) if by_kind["forecast"] else None,
        "decode_seconds": result.seconds.decode,
        "forecaster_bytes": result.forecaster_bytes,
        "weight_bytes": result.weight_bytes,
    }
