"""A rehearsal counts what real runs do, and what a 14B model would take stays within bounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from runtime.engine import Engine
from runtime.errors import BadRequestError
from runtime.forecasting.presets import load_preset
from runtime.parallel.ranks import Ranks
from runtime.parallel.topology import Degrees, Topology
from runtime.rehearsal.engine import RehearsedEngine
from runtime.rehearsal.estimate import estimate
from runtime.rehearsal.fake import DEVICE, FakeDevice, diffusers_module
from runtime.rehearsal.machine import RESERVE, Gpu, load_gpu
from runtime.rehearsal.options import options
from runtime.rehearsal.peers import FakeRanks
from runtime.rehearsal.phases import Phase, Rehearser
from runtime.rehearsal.rehearse import RankFindings, Rehearsal, Scenario, rehearse
from runtime.rehearsal.settings import RehearsedProfile
from runtime.reports.report import ModelPart, build_report
from runtime.request.config import EMBEDDED_MODELS, Config, Tiles, available, load_config
from runtime.request.memory import Memory
from runtime.request.video_request import VideoRequest
from runtime.sampling.denoise import StepRecord, summed
from runtime.sampling.result import Result
from runtime.sampling.segments import denoise_segments
from spectrum import StepKind, paper_schedule
from tests.conditioned import config_of, write_i2v, write_image, write_vace
from tests.ranks import run_ranks
from tests.solvers import NODES, write_preset

GIB = 2**30
GPU = load_gpu("h100")
Sent = dict[str, int]  # axis → bytes
Bytes = tuple[list[Sent], list[Sent], int, list[Sent]]
"""Of one rank: sent at each computed step, at each forecast step, and what is kept for forecasts; and, by the
report, what all ranks sent at each step."""


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
        result = Result(plan)
        records: list[StepRecord] = []
        denoise_segments(ranks, engine.prepare(plan), result, records.append)
        sent: dict[StepKind, list[Sent]] = {kind: [] for kind in StepKind}
        for one in records:
            sent[one.kind].append(dict(one.sent_by_axis))
        report = build_report(ModelPart(name="", revision=""), result, [], load_seconds=0, write_seconds=0)
        told = [step.sent_by_axis for step in report.step_log]
        found.append((sent[StepKind.COMPUTE], sent[StepKind.FORECAST], result.forecaster_bytes, told))
    return found


def configured(shard: bool) -> Config:
    return load_config("wan-tiny").model_copy(
        update={"memory": Memory(transformer="shard" if shard else "replicate")}
    )


def rehearsed(world: int, rank: int, job: tuple[Degrees, bool, str]) -> RankFindings:
    degrees, shard, spectrum = job
    config = configured(shard)
    request = small(config).model_copy(update={"spectrum": spectrum})
    return rehearse(Scenario(config, request, degrees, world, GPU), [rank]).ranks[0]


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
@pytest.mark.parametrize("world", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_bytes_are_those_of_real_runs(world: int) -> None:
    """Sent by every rank along each axis at each step, and kept for forecasts; shares are uneven."""
    real = run_ranks(world, ran, JOBS[world])
    for number, job in enumerate(JOBS[world]):
        findings = [rehearsed(world, rank, job) for rank in range(world)]
        for rank, found in enumerate(findings):
            computed, forecast, _, _ = real[rank][number]
            steps = found.steps
            assert computed and all(one == steps.last.sent == steps.first.sent for one in computed)
            assert bool(forecast) == (steps.forecast is not None)
            assert all(steps.forecast is not None and one == steps.forecast.sent for one in forecast)
        assert max(one.steps.history for one in findings) == real[0][number][2]
        of_step = [summed(one.steps.last.sent for one in findings)]
        of_step += [summed(one.steps.forecast.sent for one in findings if one.steps.forecast is not None)]
        told = real[0][number][3]
        assert len(told) == 8 and all(one in of_step for one in told)


def phases(config: Config, request: VideoRequest, rank: int, world: int, *, whole: bool) -> list[Phase]:
    """Every phase and step of a rank, with what is alike run once, or all of it."""
    ranks = FakeRanks(DEVICE, rank, world, GPU.per_node)
    engine = RehearsedEngine(config, RehearsedProfile(config), ranks, Degrees(), GPU, whole=whole)
    plan = engine.plan(request)
    rehearser = Rehearser(engine, plan)
    found = [rehearser.load(), rehearser.encode()]
    run, steps = rehearser.denoise()
    assert steps.forecast is not None
    return [*found, steps.first, steps.last, steps.forecast, rehearser.decode(run)]


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("rank", "world", "shard"), [(0, 1, False), (1, 3, True)])
def test_what_is_alike_is_counted_as_if_it_were_run(rank: int, world: int, shard: bool) -> None:
    config = configured(shard).model_copy(update={"tiles": Tiles(size=32, stride=24)})
    assert_alike(config, small(config), rank, world)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("write", [write_i2v, write_vace])
def test_frames_that_are_encoded_alike_are_counted_as_if_each_were(
    write: Callable[[Path], Path], tmp_path: Path
) -> None:
    """A request of 25 frames is encoded in seven chunks, of which the last ones have the same sizes."""
    config = config_of(load_config("wan-tiny"), write(tmp_path / "model"))
    image = str(write_image(tmp_path / "image.png"))
    request = config.request("x", width=48, height=48, frames=25, steps=8, spectrum="paper", image=image)
    assert_alike(config.model_copy(update={"window": None}), request, 0, 1)


def assert_alike(config: Config, request: VideoRequest, rank: int, world: int) -> None:
    """Check that what is run once counts as if all of it were run."""
    runs = [phases(config, request, rank, world, whole=whole) for whole in (False, True)]
    for once, all_of_it in zip(*runs, strict=True):
        assert once.work.operators == all_of_it.work.operators
        assert (once.memory, once.sent) == (all_of_it.memory, all_of_it.sent)


@pytest.mark.parametrize(("rank", "world", "shard"), [(0, 1, False), (1, 3, True)])
def test_operators_that_are_known_count_as_if_torch_had_found_them(
    rank: int, world: int, shard: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(shard)
    known = phases(config, small(config), rank, world, whole=False)
    monkeypatch.setattr("runtime.rehearsal.ledger.find", lambda _: None)
    found = phases(config, small(config), rank, world, whole=False)
    for one, other in zip(known, found, strict=True):
        assert one.work.operators == other.work.operators
        assert (one.memory, one.sent) == (other.memory, other.sent)


def test_a_known_operator_is_not_taken_for_one_with_other_arguments() -> None:
    """Tensors are numbered by their metadata, and numbers are arguments, too."""
    device = FakeDevice()
    with device.running():
        column, row = (torch.empty(shape, device=DEVICE) for shape in ((64, 1), (1, 64)))
        for number in range(-64, 65):
            assert (column * number).shape == (64, 1) and (row * number).shape == (1, 64)
        assert (column * row).shape == (64, 64)
        for number in range(-64, 65):
            assert (column * number).shape == (64, 1)


def test_a_known_operator_is_another_one_with_another_default_dtype() -> None:
    device = FakeDevice()
    with device.running():
        for dtype in (torch.float32, torch.bfloat16, torch.float32):
            torch.set_default_dtype(dtype)
            try:
                assert torch.ones(4, device=DEVICE).dtype == dtype
                assert (torch.ones(4, dtype=torch.int64, device=DEVICE) / 3).dtype == dtype
            finally:
                torch.set_default_dtype(torch.float32)


def test_what_depends_on_more_than_metadata_is_found_each_time() -> None:
    device = FakeDevice()
    with device.running():
        square = torch.empty((4, 4), device=DEVICE)
        for _ in range(2):
            out = torch.empty(0, device=DEVICE)
            torch.add(square, square, out=out)
            assert out.shape == (4, 4)
        complex_one = torch.empty((4, 4), dtype=torch.complex64, device=DEVICE)
        assert [complex_one.conj().is_conj() for _ in range(3)] == [True] * 3
        turned = torch.empty((2, 3), device=DEVICE)
        assert (turned + 1).shape == (2, 3)
        turned.t_()
        assert (turned + 1).shape == (3, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("kind", "part"), [(WanTransformer3DModel, "transformer"), (AutoencoderKLWan, "vae")]
)
def test_made_up_weights_are_those_that_are_loaded(kind: Any, part: str, dtype: torch.dtype) -> None:
    folder = EMBEDDED_MODELS / "wan-tiny" / part

    def layout(model: torch.nn.Module) -> dict[str, tuple[torch.Size, torch.dtype]]:
        tensors = (*model.named_parameters(), *model.named_buffers())
        return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors}

    made = diffusers_module(FakeDevice(), kind, folder, dtype)
    assert layout(made) == layout(kind.from_pretrained(folder, dtype=dtype))


@torch.no_grad()
def test_operations_are_those_that_torch_counts_in_a_real_step(engine: Engine) -> None:
    request = small(engine.config).model_copy(update={"spectrum": "off"})
    plan = engine.plan(request)
    segment = engine.prepare(plan).segment(0, None)
    kinds = dict.fromkeys(request.branches, StepKind.COMPUTE)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # fused ones go uncounted
        segment.stream.advance(0, kinds, segment.noise_BCFHW, torch.tensor([999.0]))
    found = rehearsed(1, 0, (Degrees(), False, "off")).steps.first
    assert sum(found.work.flops.values()) == counter.get_total_flops()


SHAPES = {"1.3b": (1536, 30, 8960), "14b": (5120, 40, 13824)}
GUIDED = [name for name in available(".") if "t2v" in name and load_config(name).request("x").guided]


@pytest.mark.parametrize("name", GUIDED)
def test_operations_are_those_of_the_formula(name: str) -> None:
    """12 L D² + 4 T D² + 4 L D F for each block and branch, and in attention 4 L² D + 4 L T D."""
    config = load_config(name)
    ranks = FakeRanks(DEVICE, 0, 1, GPU.per_node)
    engine = RehearsedEngine(config, RehearsedProfile(config), ranks, Degrees(), GPU)
    request = config.request("x")
    _, steps = Rehearser(engine, engine.plan(request)).denoise()
    D, blocks, F = next(shape for size, shape in SHAPES.items() if size in name)
    L, T, flops = engine.sizes.tokens(config.windowed(request)), 512, steps.last.work.flops
    linear = 2 * blocks * (12 * L * D**2 + 4 * T * D**2 + 4 * L * D * F)
    assert flops["attention"] == 2 * blocks * (4 * L**2 * D + 4 * L * T * D)
    assert 0 < flops["linear"] - linear < 0.001 * linear  # the time embedding and the head


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("ranks", "denoise", "ulysses", "ring", "launches", "forecast_launches", "decode_launches"),
    [
        (8, 33.0, 23_224_320_000, 0, 4_300, 180, 15_500),
        (64, 29.5, 3_387_596_800, 5_805_670_400, 6_300, 170, 16_600),
    ],
)
def test_14b_at_720p_stays_within_bounds(
    ranks: int,
    denoise: float,
    ulysses: int,
    ring: int,
    launches: int,
    forecast_launches: int,
    decode_launches: int,
) -> None:
    """Memory in GiB, bytes and launches of the ranks that hold and do the most.

    Whoever makes a number smaller should make its bound smaller, too.
    """
    config = load_config("wan2.1-t2v-14b-720p")
    found = rehearse(Scenario(config, config.request("x", spectrum="paper"), Degrees(), ranks, GPU))
    assert found.fits
    for one in found.ranks:
        steps = one.steps
        assert steps.forecast is not None
        assert steps.memory.peak < denoise * GIB
        assert one.peaks["encode"].peak < 38 * GIB and one.peaks["decode"].peak < 29.6 * GIB
        sent = steps.last.sent
        assert (sent.get("ulysses", 0), sent.get("ring", 0)) == (ulysses, ring)
        output = steps.forecast.sent
        assert output == {axis: sent[axis] for axis in ("cfg", "sequence")}
        assert sum(output.values()) < 10e6
        assert steps.last.work.launches < launches
        assert steps.forecast.work.launches < forecast_launches
        assert one.decode.work.launches < decode_launches


PARAMETERS = {
    "wan-tiny": 5.1e6,
    "wan2.2-tiny": 2 * 5.1e6,
    "wan2.1-t2v-1.3b-480p": 1.419e9,
    "wan2.1-t2v-14b-480p": 14.29e9,
    "wan2.1-t2v-14b-720p": 14.29e9,
    "wan2.1-i2v-14b-480p": 16.40e9,
    "wan2.1-vace-1.3b-480p": 2.15e9,
    "wan2.1-vace-14b-480p": 17.34e9,
    "wan2.2-t2v-14b-480p": 2 * 14.29e9,
    "wan2.2-t2v-14b-720p": 2 * 14.29e9,
    "wan2.2-i2v-14b-480p": 2 * 14.29e9,
    "wan2.2-i2v-14b-720p": 2 * 14.29e9,
    "wan2.2-ti2v-5b-720p": 5.00e9,
    "wan2.1-t2v-14b-480p-lightx2v": 14.29e9,
    "wan2.1-t2v-14b-480p-causvid": 14.29e9,
    "wan2.1-t2v-14b-480p-fastwan": 14.29e9,
    "wan2.2-ti2v-5b-720p-fastwan": 5.00e9,
    "wan2.1-i2v-14b-480p-lightx2v": 16.40e9,
    "wan2.2-t2v-14b-480p-lightx2v": 2 * 14.29e9,
    "wan2.2-i2v-14b-720p-lightx2v": 2 * 14.29e9,
}
"""As the repositories state them, rounded."""


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", available("."))
def test_every_config_is_known_without_its_weights(name: str) -> None:
    config = load_config(name)
    image = "made up" if "ti2v" in name else None  # others that need one are given one
    small_one = config.request("x", width=64, height=64, frames=5, image=image)
    rank = 0 if "i2v" in name or name == "wan2.1-vace-1.3b-480p" else 1  # the first also encodes
    found = rehearse(Scenario(config, small_one, Degrees(), 2, GPU), [rank])
    assert found.parameters == pytest.approx(PARAMETERS[name], rel=0.005)
    assert config.architecture is not None
    assert found.ranks[0].steps.last.work.flops["attention"] > 0
    assert sum(found.ranks[0].steps.last.sent.values()) > 0


@pytest.mark.parametrize("spectrum", available("spectrum"))
def test_every_preset_is_rehearsed(spectrum: str) -> None:
    config = load_config("wan2.2-tiny" if "experts" in spectrum else "wan-tiny")
    found = rehearse(Scenario(config, config.request("x", spectrum=spectrum), Degrees(), 2, GPU), [1])
    steps = found.ranks[0].steps
    assert (steps.forecast is None) == (spectrum == "off")
    assert found.computed + found.forecast == 50


def test_a_fitted_solver_is_rehearsed(engine: Engine, tmp_path: Path) -> None:
    """It keeps the noise and two values of every node, and a skipped step does nothing."""
    request = engine.config.request(
        "a red circle",
        width=64,
        height=48,
        frames=5,
        steps=50,
        max_sequence_length=32,
        spectrum=write_preset(tmp_path),
    )
    plan = engine.plan(request)
    result = Result(plan)
    denoise_segments(engine.ranks, engine.prepare(plan), result)
    for world, degrees in ((1, Degrees()), (2, Degrees(cfg=2)), (2, Degrees(ulysses=2))):
        found = rehearse(Scenario(engine.config, request, degrees, world, GPU), [0]).ranks[0].steps
        assert found.history == result.forecaster_bytes
        assert found.kept == result.features_kept == len(NODES)
        assert found.forecast is not None and sum(found.forecast.sent.values()) == 0
        skipped, computed = (sum(one.work.flops.values()) for one in (found.forecast, found.last))
        assert skipped < 1e-4 * computed


def test_what_does_not_fit_is_told_how_it_would() -> None:
    """A frame of four tiles takes the most when it is decoded whole."""
    config = load_config("wan-tiny")
    request = config.request("x", width=448, height=448, frames=1, steps=5)
    scenario = Scenario(config, request, Degrees(), 1, GPU)
    held = rehearse(scenario, [0]).peak
    scarce = GPU.model_copy(update={"memory_gib": (RESERVE + held) / GIB})
    assert scarce.room(held) < 0
    option = next(options(replace(scenario, gpu=scarce)))
    assert option.changes == {"decode": "auto"}
    assert option.rehearsal.fits and option.rehearsal.peak < held


def test_history_is_offloaded() -> None:
    config = load_config("wan-tiny")
    request = config.request("x", width=128, height=128, frames=17)
    kept, moved = (
        rehearse(
            Scenario(config.model_copy(update={"memory": Memory(history=how)}), request, Degrees(), 1, GPU)
        ).ranks[0]
        for how in ("keep", "offload")
    )
    assert moved.steps.history == kept.steps.history > 0 == moved.steps.memory.history
    assert moved.steps.memory.peak < kept.steps.memory.peak - 0.7 * kept.steps.history


@cache
def two_experts(experts: str, spectrum: str = "paper") -> Rehearsal:
    """Wan2.2 on one H100, both of whose experts take 57 GB in bfloat16."""
    config = load_config("wan2.2-t2v-14b-480p")
    memory = config.memory.model_copy(update={"experts": experts})
    request = config.request("x", spectrum=spectrum)
    return rehearse(Scenario(config.model_copy(update={"memory": memory}), request, Degrees(), 1, GPU), [0])


@cache
def performing(gpu: Gpu = GPU, **changes: Any) -> Rehearsal:
    config = load_config("wan2.1-t2v-14b-480p").model_copy(update=changes)
    return rehearse(Scenario(config, config.request("x", spectrum="off"), Degrees(), 1, gpu), [0])


def test_overlapped_exchanges_are_three_of_one_and_send_as_many_bytes() -> None:
    """A step of 14B on eight ranks copies as many bytes into send buffers, in more launches."""
    found = []
    for overlaps in (False, True):
        config = load_config("wan2.1-t2v-14b-480p").model_copy(update={"overlap_exchanges": overlaps})
        asked = Scenario(config, config.request("x", spectrum="off"), Degrees(cfg=1, ulysses=8), 8, GPU)
        found.append(rehearse(asked, [0]).ranks[0].steps.last)
    usual, overlapped = found
    assert usual.sent == overlapped.sent and usual.sent["ulysses"] > 0
    assert usual.work.flops == overlapped.work.flops
    assert usual.work.launches <= overlapped.work.launches


def test_quantised_weights_take_half_and_products_in_fp8_half_the_time() -> None:
    """Of each weight in the blocks one byte instead of two, and four for each of its outputs."""
    (D, blocks, F), whole = SHAPES["14b"], performing()
    saved = blocks * (8 * D**2 + 2 * D * F - 4 * (9 * D + F))
    before, steps = whole.ranks[0], {}
    for quantization, fuse in (("fp8", False), ("fp8", True), ("int8", False)):
        found = performing(quantization=quantization, fuse_projections=fuse)
        now = found.ranks[0]
        assert before.load.memory.weights - now.load.memory.weights == saved
        assert now.steps.last.work.flops == before.steps.last.work.flops
        steps[quantization, fuse] = now.steps.last
    linear = estimate(before.steps.last, whole.topology, GPU).linear
    assert 0.49 < estimate(steps["fp8", False], whole.topology, GPU).linear / linear < 0.51
    assert estimate(steps["int8", False], whole.topology, GPU).linear == pytest.approx(linear, rel=0.01)
    assert steps["fp8", True].work.launches < steps["fp8", False].work.launches
    assert steps["fp8", True].work.moved < steps["fp8", False].work.moved


@pytest.mark.parametrize("spectrum", ["universal", "universal-8"])
def test_fused_forecasts_launch_nothing_and_copy_nothing(spectrum: str) -> None:
    """As docs/ranks.md says; whoever changes these numbers should change them there."""
    config = load_config("wan2.1-t2v-14b-480p")
    request, found = config.request("x", spectrum=spectrum), {}
    for fuse in (False, True):
        settings = config.model_copy(update={"fuse_forecasts": fuse})
        found[fuse] = rehearse(Scenario(settings, request, Degrees(), 1, GPU), [0])
    assert (found[True].computed, found[True].forecast) == (found[False].computed, found[False].forecast)
    before, now = (found[fuse].ranks[0].steps for fuse in (False, True))
    assert before.forecast is not None and now.forecast is not None
    assert 100 < before.forecast.work.launches < 120 and before.forecast.work.moved > 5e8
    assert (now.forecast.work.launches, now.forecast.work.moved, now.forecast.sent) == (0, 0, {})
    assert before.last.work.launches - now.last.work.launches > 80
    assert before.last.work.crossed == 24 and now.last.work.crossed == 0  # scalars of the sampler
    assert now.last.work.flops == before.last.work.flops
    size = 16 * 21 * 60 * 104  # numbers of the latents
    assert before.history == 2 * 2 * size and now.history == 4 * found[True].computed * size
    assert now.kept == found[True].computed


def test_a_gpu_without_fp8_is_refused_it() -> None:
    with pytest.raises(BadRequestError, match=r"^quantization: 'fp8' given; NVIDIA H100 .* has no fp8$"):
        performing(GPU.model_copy(update={"fp8_tflops": None}), performance="fastest")


def test_the_fastest_attention_is_that_of_the_gpu() -> None:
    assert performing().attention == "sdpa"
    assert performing(performance="fast").attention == "cudnn"
    assert performing(load_gpu("4090"), performance="fast").attention == "sdpa"


BLOCK_14B = 0.704e9  # bytes of one of 40 blocks in bfloat16, which are most of 14.29 billion parameters


def test_experts_that_swap_hold_the_blocks_of_one() -> None:
    kept, swapped = (two_experts(how).ranks[0] for how in ("keep", "swap"))
    assert kept.load.memory.weights - swapped.load.memory.weights == pytest.approx(40 * BLOCK_14B, rel=0.003)
    assert swapped.steps.memory.weights == swapped.load.memory.weights
    assert kept.steps.last.work.flops == swapped.steps.last.work.flops
    assert swapped.steps.last.work.crossed < 0.001 * BLOCK_14B


@pytest.mark.parametrize("name", ["wan2.1-t2v-14b-480p", "wan2.2-t2v-14b-480p"])
def test_an_offloaded_transformer_holds_two_blocks_and_copies_each_once_in_a_computed_step(name: str) -> None:
    config = load_config(name)
    kept, offloaded = (
        rehearse(
            Scenario(
                config.model_copy(update={"memory": config.memory.model_copy(update={"transformer": how})}),
                config.request("x", width=64, height=48, frames=5),
                Degrees(),
                1,
                GPU,
            ),
            [0],
        ).ranks[0]
        for how in ("replicate", "offload")
    )
    blocks = 40 * kept.experts
    spared = kept.load.memory.weights - offloaded.load.memory.weights
    assert spared == pytest.approx((blocks - 2) * BLOCK_14B, rel=0.003)
    steps = offloaded.steps
    assert steps.memory.weights == offloaded.load.memory.weights
    assert steps.last.work.crossed == pytest.approx(40 * BLOCK_14B, rel=0.01)
    assert steps.last.work.flops == kept.steps.last.work.flops
    assert steps.forecast is not None and steps.forecast.work.crossed < 1000  # of the sampler
    took = estimate(steps.last, Topology(1, 1, 1), GPU)
    assert took.total == took.bus == pytest.approx(40 * BLOCK_14B / (0.8 * 64e9), rel=0.01)


def test_what_fits_nowhere_else_is_offloaded() -> None:
    config = load_config("wan2.1-t2v-14b-480p")
    request = config.request("x", width=64, height=48, frames=5)
    memory = config.memory.model_copy(update={"text_encoder": "free"})
    scarce = GPU.model_copy(update={"memory_gib": 20})
    scenario = Scenario(config.model_copy(update={"memory": memory}), request, Degrees(), 1, scarce)
    option = next(options(scenario))
    assert option.changes == {"memory.transformer": "offload"} and option.rehearsal.fits


def in_dtypes(**dtypes: str) -> RankFindings:
    config = load_config("wan-tiny")
    config = config.model_copy(update={"dtype": config.dtype.model_copy(update=dtypes)})
    return rehearse(Scenario(config, small(config), Degrees(), 1, GPU), [0]).ranks[0]


def test_a_compute_dtype_of_its_own_is_rehearsed() -> None:
    """Blocks are kept in the storage dtype and are cast, one at a time, for steps in the compute dtype."""
    stored, mixed, wide = (
        in_dtypes(transformer=kept, compute=computed)
        for kept, computed in (("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "float32"))
    )
    assert stored.load.memory.weights < mixed.load.memory.weights < wide.load.memory.weights
    assert mixed.steps.last.work.flops == wide.steps.last.work.flops
    assert mixed.steps.history == wide.steps.history == 2 * stored.steps.history
    assert mixed.steps.last.work.launches > wide.steps.last.work.launches  # of the casts


def test_an_offloaded_vae_is_counted_where_it_works() -> None:
    config = load_config("wan-tiny")
    kept, away = (
        rehearse(
            Scenario(config.model_copy(update={"memory": Memory(vae=how)}), small(config), Degrees(), 1, GPU),
            [0],
        ).ranks[0]
        for how in ("keep", "offload")
    )
    path = EMBEDDED_MODELS / "wan-tiny" / "vae"
    vae = AutoencoderKLWan.from_config(AutoencoderKLWan.load_config(path))
    least = sum(weight.numel() * weight.element_size() for weight in vae.parameters())
    for phase in ("load", "encode", "denoise"):
        assert kept.peaks[phase].weights - away.peaks[phase].weights >= least
    assert kept.peaks["decode"] == away.peaks["decode"]
    assert kept.decode.work == away.decode.work


def test_steps_are_counted_with_the_experts_warm_up() -> None:
    found = two_experts("swap")
    config = load_config("wan2.2-t2v-14b-480p")
    profile = RehearsedProfile(config)
    request = config.request("x")
    switch = profile.course(profile.fresh_sampler(request), load_preset("paper")).numbers.index(1)
    assert switch == 26
    assert found.computed == paper_schedule(40, fresh={26: 2}).nfe and found.forecast == 40 - found.computed
    assert found.ranks[0].steps.kept == paper_schedule(26).nfe  # the most that is remembered at one time


def test_what_does_not_fit_is_told_to_swap_its_experts() -> None:
    config = load_config("wan2.2-t2v-14b-480p")
    scenario = Scenario(config, config.request("x"), Degrees(), 1, GPU.model_copy(update={"memory_gib": 64}))
    option = next(options(scenario))
    assert option.changes == {"memory.experts": "swap"} and option.rehearsal.fits


def test_sharding_holds_two_blocks_and_the_shares() -> None:
    """Of 14.29 billion parameters in bfloat16 most are in 40 blocks of 704 MB."""
    config = load_config("wan2.1-t2v-14b-480p")
    kept, shared = (
        rehearse(
            Scenario(
                config.model_copy(update={"memory": Memory(transformer=how, text_encoder="free")}),
                config.request("x"),
                Degrees(),
                8,
                GPU,
            ),
            [1],
        ).ranks[0]
        for how in ("replicate", "shard")
    )
    block = 0.704e9
    assert shared.load.memory.peak < kept.load.memory.peak - 0.8 * 40 * block
    held = shared.steps.memory.weights - shared.load.memory.weights
    assert 1.9 * block < held < 2.2 * block
    assert shared.steps.last.sent["everyone"] == pytest.approx(40 * block * 7 / 8, rel=0.01)
    assert "everyone" not in (shared.steps.forecast or shared.steps.last).sent
