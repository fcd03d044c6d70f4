"""Report of a run, as JSON. Other programs read it, so its schema is versioned."""

from __future__ import annotations

import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from runtime.media.quality import Quality
from runtime.sampling.plan import Generation
from runtime.versions import versions
from spectrum import StepKind


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ModelPart(_Part):
    name: str
    revision: str


class TopologyPart(_Part):
    world: int
    cfg: int
    ring: int
    ulysses: int


class BranchSteps(_Part):
    cond: list[int]
    uncond: list[int]


class BranchNfe(_Part):
    cond: int
    uncond: int


class SecondsPart(_Part):
    load: float
    encode: float
    denoise: float
    decode: float
    write: float
    total: float


class StepSeconds(_Part):
    computed_median: float | None
    forecast_median: float | None


class ForecasterPart(_Part):
    bytes_per_rank: int
    features_kept: int


class CollectiveBytes(_Part):
    """Bytes that all ranks together send at one step: the maximum over the steps of the kind."""

    computed_step: int
    forecast_step: int


class QualityPart(_Part):
    """Quality against the full sampler, mean over the videos; see `runtime.media.quality.Quality`."""

    psnr: float
    ssim: float
    vmaf: float | None


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


class StepPart(_Part):
    """One step.

    Attributes:
        sent: bytes that all ranks sent.
        expert: name of the transformer that the step is of.
        error: relative error that a forecast of a computed step would have had; None if unknown.
        expected: expected relative error of that forecast, or of the one that was made; None if unknown.
    """

    index: int
    kind: StepKind
    timestep: float
    seconds: float
    sent: int
    expert: str
    error: float | None
    expected: float | None


class Report(_Part):
    """Content of `report.json`, schema 1. Times are seconds of wall clock."""

    schema_: Literal[1] = 1
    request: dict[str, Any]
    spectrum: dict[str, Any]
    model: ModelPart
    recipe: str
    topology: TopologyPart
    attention: str
    steps: int
    computed: BranchSteps
    nfe: BranchNfe
    decision_digest: list[str]
    seconds: SecondsPart
    step_seconds: StepSeconds
    step_log: list[StepPart]
    windows: int
    resumed_at: int
    checkpoint_bytes: int
    forecaster: ForecasterPart
    collective_bytes: CollectiveBytes
    expectation: ExpectationPart
    frames_sha256: list[str]
    videos: list[str]
    warnings: list[str] = []
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
    model: ModelPart, generation: Generation, videos: list[Path], *, load_seconds: float, write_seconds: float
) -> Report:
    """Build the report of one generation.

    Args:
        model: model that made it.
        generation: record of the generation.
        videos: video files that were written.
        load_seconds: time spent loading the model.
        write_seconds: time spent finishing the files after their last frame.
    """
    phases = asdict(generation.seconds)
    phases["write"] += write_seconds
    computed, topology, expected = generation.computed, generation.topology, generation.expectation
    return Report(
        request=generation.request.model_dump(),
        spectrum=generation.preset.model_dump(),
        model=model,
        recipe=generation.recipe,
        topology=TopologyPart(
            world=topology.world, cfg=topology.cfg, ring=topology.ring, ulysses=topology.ulysses
        ),
        attention=generation.attention,
        steps=len(generation.steps),
        computed=BranchSteps(**computed),
        nfe=BranchNfe(**{branch: len(steps) for branch, steps in computed.items()}),
        decision_digest=generation.digests,
        seconds=SecondsPart(load=load_seconds, **phases, total=load_seconds + sum(phases.values())),
        step_seconds=StepSeconds(
            computed_median=_median_seconds(generation, StepKind.COMPUTE),
            forecast_median=_median_seconds(generation, StepKind.FORECAST),
        ),
        step_log=[
            StepPart(
                **asdict(step) | {"sent": sent},
                error=generation.errors.get(step.index),
                expected=expected.errors.get(step.index),
            )
            for step, sent in zip(generation.steps, generation.sent, strict=True)
        ],
        windows=generation.windows,
        resumed_at=generation.resumed_at,
        checkpoint_bytes=generation.checkpoint_bytes,
        forecaster=ForecasterPart(
            bytes_per_rank=generation.forecaster_bytes, features_kept=generation.features_kept
        ),
        collective_bytes=CollectiveBytes(
            computed_step=_most_sent(generation, StepKind.COMPUTE),
            forecast_step=_most_sent(generation, StepKind.FORECAST),
        ),
        expectation=ExpectationPart(
            psnr=expected.psnr,
            deviation=expected.deviation,
            added=expected.added,
            dropped=expected.dropped,
        ),
        frames_sha256=generation.frames_sha256,
        videos=[str(path) for path in videos],
        warnings=generation.warnings,
        versions=versions(),
    )


def add_comparison(report: Report, generation: Generation, full: Generation, measured: list[Quality]) -> None:
    """Add the comparison with the full sampler's generation to the report."""
    vmafs = [q.vmaf for q in measured if q.vmaf is not None]
    report.quality = QualityPart(
        psnr=statistics.fmean(q.psnr for q in measured),
        ssim=statistics.fmean(q.ssim for q in measured),
        vmaf=statistics.fmean(vmafs) if vmafs else None,
    )
    report.comparison = ComparisonPart(
        denoise_seconds=_step_seconds(full),
        speedup=_step_seconds(full) / _step_seconds(generation),
        ideal_speedup=full.nfe / generation.nfe,
    )


def _step_seconds(generation: Generation) -> float:
    """Total seconds of all steps, including steps restored from a checkpoint."""
    return sum(step.seconds for step in generation.steps)


def _median_seconds(generation: Generation, kind: StepKind) -> float | None:
    times = [step.seconds for step in generation.steps if step.kind is kind]
    return statistics.median(times) if times else None


def _most_sent(generation: Generation, kind: StepKind) -> int:
    pairs = zip(generation.steps, generation.sent, strict=True)
    return max((sent for step, sent in pairs if step.kind is kind), default=0)
