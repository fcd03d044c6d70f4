"""A rehearsal counts what real runs do, and what a 14B model would take stays within bounds."""

from __future__ import annotations

import pytest

from runtime.engine import Engine
from runtime.parallel.ranks import Ranks
from runtime.parallel.topology import Degrees
from runtime.rehearsal.machine import load_gpu
from runtime.rehearsal.rehearse import Asked, RankFindings, rehearse
from runtime.request.config import Config, Memory, load_config
from runtime.request.video_request import VideoRequest
from runtime.sampling.denoise import StepRecord
from runtime.sampling.plan import Generation
from runtime.sampling.segments import denoise_segments
from spectrum import StepKind
from tests.ranks import run_ranks

GIB = 2**30
GPU = load_gpu("h100")
Bytes = tuple[list[int], list[int], int]
"""Of one rank: sent at each computed step, at each forecast step, and what is kept for forecasts."""


def small(config: Config) -> VideoRequest:
    """45 tokens, which divide by neither 2 nor 4."""
    return config.request("a red circle", width=48, height=48, frames=17, steps=8, max_sequence_length=32)


def ran(ranks: Ranks, jobs: list[tuple[Degrees, bool, str]]) -> list[Bytes]:
    """What a rank sent and kept in real runs of each job."""
    found = []
    for degrees, shard, spectrum in jobs:
        config = configured(shard)
        engine = Engine(config, ranks, degrees)
        plan = engine.plan(small(config).model_copy(update={"spectrum": spectrum}))
        generation = Generation(plan.request, plan.preset, plan.topology, plan.attention)
        records: list[StepRecord] = []
        denoise_segments(ranks, engine.prepare(plan), generation, records.append)
        sent: dict[StepKind, list[int]] = {kind: [] for kind in StepKind}
        for one in records:
            sent[one.kind].append(one.sent)
        found.append((sent[StepKind.COMPUTE], sent[StepKind.FORECAST], generation.forecaster_bytes))
    return found


def configured(shard: bool) -> Config:
    return load_config("wan-tiny").model_copy(
        update={"memory": Memory(transformer="shard" if shard else "replicate")}
    )


def rehearsed(world: int, rank: int, job: tuple[Degrees, bool, str]) -> RankFindings:
    degrees, shard, spectrum = job
    config = configured(shard)
    request = small(config).model_copy(update={"spectrum": spectrum})
    return rehearse(Asked(config, request, degrees, world, GPU), [rank]).ranks[0]


JOBS: dict[int, list[tuple[Degrees, bool, str]]] = {
    1: [(Degrees(), False, "paper"), (Degrees(), False, "off")],
    2: [
        (Degrees(cfg=2), False, "paper"),
        (Degrees(ring=2), False, "paper"),
        (Degrees(ulysses=2), False, "paper"),
        (Degrees(ulysses=2), True, "off"),
    ],
    4: [
        (Degrees(cfg=2, ring=1, ulysses=2), False, "paper"),
        (Degrees(cfg=1, ring=2, ulysses=2), False, "paper"),
        (Degrees(cfg=1, ring=1, ulysses=4), False, "paper"),
        (Degrees(cfg=1, ring=4, ulysses=1), False, "paper"),
        (Degrees(cfg=2, ring=2, ulysses=1), True, "paper"),
    ],
}


@pytest.mark.timeout(240)
@pytest.mark.parametrize("world", JOBS)
def test_bytes_are_those_of_real_runs(world: int) -> None:
    """Sent by every rank at each step and kept for forecasts, to the byte; shares are uneven."""
    real = run_ranks(world, ran, JOBS[world])
    for number, job in enumerate(JOBS[world]):
        findings = [rehearsed(world, rank, job) for rank in range(world)]
        for rank, found in enumerate(findings):
            computed, forecast, _ = real[rank][number]
            steps = found.steps
            assert set(computed) == {sum(steps.last.sent.values())} == {sum(steps.first.sent.values())}
            expected = {sum(steps.forecast.sent.values())} if steps.forecast else set()
            assert set(forecast) == expected
        assert max(one.steps.history for one in findings) == real[0][number][2]
