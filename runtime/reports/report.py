"""Report of a run, as JSON. Other programs read it, so its schema is versioned."""

from __future__ import annotations

import socket
import statistics
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from runtime.media.quality import Quality
from runtime.sampling.result import Result
from runtime.versions import versions
from spectrum import StepKind


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class LoraPart(_Part):
    file: str
    scale: float
    expert: str | None
    digest: str


class ModelPart(_Part):
    name: str
    revision: str
    loras: list[LoraPart] = []


class TopologyPart(_Part):
    world: int
    cfg: int
    ring: int
    ulysses: int


class PerformancePart(_Part):
    """What made steps faster; see `runtime.request.performance.Performance`.

    Attributes:
        batch_guidance: whether ranks evaluated both branches of guidance as one batch.
        kernel: attention kernel that ran; where `attention` is `sdpa`, the one that torch chose.
    """

    profile: str
    compile: bool
    fuse_projections: bool
    fuse_forecasts: bool
    batch_guidance: bool
    overlap_exchanges: bool
    quantization: str
    kernel: str


class BranchSteps(_Part):
    cond: list[int]
    uncond: list[int]


class BranchNfe(_Part):
    cond: int
    uncond: int


class SecondsPart(_Part):
    load: float
    lora: float
    encode: float
    denoise: float
    decode: float
    write: float
    total: float


class StepSecondsPart(_Part):
    computed_median: float | None
    forecast_median: float | None


class ForecasterPart(_Part):
    bytes_per_rank: int
    features_kept: int


class MemoryPart(_Part):
    """Bytes on the first rank's device, at most at one time; and where idle weights were."""

    weights: int
    device_peak: int | None
    text_encoder: str
    vae: str


class CollectiveBytes(_Part):
    """Bytes that all ranks together send at one step: the maximum over the steps of the kind."""

    computed_step: int
    forecast_step: int


class QualityPart(_Part):
    """Quality against the full sampler, mean over the videos; see `runtime.media.quality.Quality`."""

    psnr: float
    ssim: float
    vmaf: float | None


class PreviewPart(_Part):
    """Previews that were made, and the time that they took of denoising on the first rank."""

    count: int
    seconds: float


class ComparisonPart(_Part):
    """Comparison with the full sampler, which ran just before on the same machine."""

    denoise_seconds: float
    speedup: float
    ideal_speedup: float


class ExpectationPart(_Part):
    """Expected quality, from the calibration and the measured forecast errors.

    See `runtime.forecasting.expectation.Expectation`.
    """

    psnr: float | None
    deviation: float | None
    added: list[int]
    dropped: list[int]
    handed_over: int | None
    note: str


class StepPart(_Part):
    """One step.

    Attributes:
        sent: bytes that all ranks sent.
        sent_by_axis: the same for each axis along which any were sent.
        expert: name of the transformer that the step is of.
        error: relative error that a forecast of a computed step would have had; None if unknown.
        expected: expected relative error of that forecast, or of the one that was made; None if unknown.
    """

    index: int
    kind: StepKind
    timestep: float
    seconds: float
    sent: int
    sent_by_axis: dict[str, int]
    expert: str
    error: float | None
    expected: float | None


class Report(_Part):
    """Content of `report.json`, schema 1. Times are seconds of wall clock.

    Attributes:
        chosen: why the preset was chosen; None if it was named.
        made: date and time in UTC, as ISO 8601 writes it.
        host, device: name of the first rank's machine, and its device.
        dtype: what the transformers computed in.
    """

    schema_: Literal[1] = 1
    request: dict[str, Any]
    spectrum: dict[str, Any]
    chosen: str | None
    made: str
    host: str
    device: str
    dtype: str
    fps: int
    model: ModelPart
    recipe: str
    topology: TopologyPart
    attention: str
    performance: PerformancePart
    steps: int
    computed: BranchSteps
    nfe: BranchNfe
    decision_digest: list[str]
    seconds: SecondsPart
    step_seconds: StepSecondsPart
    step_log: list[StepPart]
    windows: int
    resumed_at: int
    checkpoint_bytes: int
    forecaster: ForecasterPart
    memory: MemoryPart
    collective_bytes: CollectiveBytes
    expectation: ExpectationPart
    frames_sha256: list[str]
    videos: list[str]
    warnings: list[str] = []
    preview: PreviewPart | None = None
    quality: QualityPart | None = None
    comparison: ComparisonPart | None = None
    versions: dict[str, str]

    model_config = ConfigDict(
        extra="forbid",
        alias_generator=lambda name: "schema" if name == "schema_" else name,
        populate_by_name=True,
    )

    def to_json(self) -> str:
        return self.model_dump_json(by_alias=True, indent=2)


def build_report(
    model: ModelPart,
    result: Result,
    videos: list[Path],
    *,
    load_seconds: float,
    write_seconds: float,
    chosen: str = "",
) -> Report:
    """Build the report of one result.

    Args:
        model: model that made it.
        result: what was made, and what it took.
        videos: video files that were written.
        load_seconds: time spent loading the model.
        write_seconds: time spent finishing the files after their last frame.
        chosen: why the preset was chosen; empty if it was named.
    """
    phases = asdict(result.seconds)
    phases["write"] += write_seconds
    plan, computed, expected = result.plan, result.computed, result.expectation
    topology, typical, previews = plan.topology, result.step_seconds, result.preview_seconds
    performs = result.performs
    return Report(
        request=plan.request.model_dump(),
        spectrum=plan.preset.model_dump(),
        chosen=chosen or None,
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        host=socket.gethostname(),
        device=result.device,
        dtype=result.dtype,
        fps=result.fps,
        model=model,
        recipe=result.recipe,
        topology=TopologyPart(
            world=topology.world, cfg=topology.cfg, ring=topology.ring, ulysses=topology.ulysses
        ),
        attention=plan.attention,
        performance=PerformancePart(
            profile=performs.profile,
            compile=performs.compile,
            fuse_projections=performs.fuse_projections,
            fuse_forecasts=performs.fuse_forecasts,
            batch_guidance=plan.batched,
            overlap_exchanges=performs.overlap_exchanges,
            quantization=performs.quantization,
            kernel=result.kernel,
        ),
        steps=len(result.steps),
        computed=BranchSteps(**computed),
        nfe=BranchNfe(**{branch: len(steps) for branch, steps in computed.items()}),
        decision_digest=result.digests,
        seconds=SecondsPart(load=load_seconds, **phases, total=load_seconds + sum(phases.values())),
        step_seconds=StepSecondsPart(computed_median=typical.computed, forecast_median=typical.forecast),
        step_log=[
            StepPart(
                **asdict(step)
                | {"sent": sum(sent.values()), "sent_by_axis": sent, "error": result.errors.get(step.index)},
                expected=expected.errors.get(step.index),
            )
            for step, sent in zip(result.steps, result.sent_by_axis, strict=True)
        ],
        windows=len(plan.windows),
        resumed_at=result.resumed_at,
        checkpoint_bytes=result.checkpoint_bytes,
        forecaster=ForecasterPart(bytes_per_rank=result.forecaster_bytes, features_kept=result.features_kept),
        memory=MemoryPart(
            weights=result.weight_bytes,
            device_peak=result.device_peak,
            text_encoder=result.memory.text_encoder,
            vae=result.memory.vae,
        ),
        collective_bytes=CollectiveBytes(
            computed_step=_most_sent(result, StepKind.COMPUTE),
            forecast_step=_most_sent(result, StepKind.FORECAST),
        ),
        expectation=ExpectationPart(
            psnr=expected.psnr,
            deviation=expected.deviation,
            added=expected.added,
            dropped=expected.dropped,
            handed_over=expected.handed_over,
            note=expected.note,
        ),
        frames_sha256=result.frames_sha256,
        videos=[str(path) for path in videos],
        warnings=result.warnings,
        preview=None if previews is None else PreviewPart(count=len(previews), seconds=sum(previews)),
        versions=versions(),
    )


def add_comparison(report: Report, result: Result, full: Result, measured: list[Quality]) -> None:
    """Add the comparison with the full sampler's result to the report."""
    vmafs = [q.vmaf for q in measured if q.vmaf is not None]
    report.quality = QualityPart(
        psnr=statistics.fmean(q.psnr for q in measured),
        ssim=statistics.fmean(q.ssim for q in measured),
        vmaf=statistics.fmean(vmafs) if vmafs else None,
    )
    report.comparison = ComparisonPart(
        denoise_seconds=_all_steps(full),
        speedup=_all_steps(full) / _all_steps(result),
        ideal_speedup=full.nfe / result.nfe,
    )


def _all_steps(result: Result) -> float:
    """Total seconds of all steps, including steps restored from a checkpoint."""
    return sum(step.seconds for step in result.steps)


def _most_sent(result: Result, kind: StepKind) -> int:
    pairs = zip(result.steps, result.sent, strict=True)
    return max((sent for step, sent in pairs if step.kind is kind), default=0)
