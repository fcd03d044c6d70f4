"""One generation on many ranks is that of one: the latents agree, whatever divides, whatever is skipped."""

from __future__ import annotations

import time
from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from diffusers import UniPCMultistepScheduler, WanTransformer3DModel

from runtime.files.text import flatten
from runtime.models.wan.adapter import WanAdapter
from runtime.models.wan.attention import SelfAttention
from runtime.parallel.attention import attend
from runtime.parallel.kernels import find_kernel
from runtime.parallel.ranks import Ranks, minority
from runtime.parallel.sequence import Split
from runtime.parallel.topology import Topology
from runtime.sampling.coordinator import Coordinator, Deadline
from runtime.sampling.denoise import Denoising, StepRecord, denoise
from runtime.sampling.network import Branch, Network
from runtime.sampling.streams import STREAMS
from spectrum import ChebyshevRidge, ErrorSchedule, FixedSchedule, Schedule, StepKind, paper_schedule
from spectrum.universal import flow_levels, universal
from tests.ranks import WarmRanks, run_ranks

STEPS, HEADS, HEAD_DIM, LAYERS, CHANNELS = 8, 5, 12, 2, 16
CASES = [(1, (2, 4, 6)), (2, (3, 6, 2))]  # batch and latent size: 12 and 9 tokens
CPU = torch.device("cpu")
LEVELS = flow_levels(STEPS, 3.0)


class Result(NamedTuple):
    latents: torch.Tensor
    steps: list[StepRecord]
    errors: dict[int, float]
    digests: list[str]
    computed: dict[str, list[int]]


def transformer(dtype: torch.dtype) -> WanTransformer3DModel:
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        num_layers=LAYERS,
        ffn_dim=48,
        text_dim=16,
        freq_dim=16,
    )
    return model.to(dtype).eval()


def schedules(name: str) -> dict[str, Schedule]:
    match name:
        case "paper":
            shared: Schedule = paper_schedule(STEPS, warmup=3)
        case "universal":
            shared = FixedSchedule(STEPS, universal().planner(LEVELS).plan(4).computed)
        case "error":
            shared = ErrorSchedule(STEPS, tolerance=0.8, warmup=2)
        case _:
            return {"cond": FixedSchedule(STEPS, (0, 1, 4)), "uncond": FixedSchedule(STEPS, (0, 1, 2, 5))}
    return {"cond": shared, "uncond": shared}


@torch.no_grad()
def generate(
    ranks: Ranks,
    topology: Topology,
    schedule: str,
    batch: int,
    size: tuple[int, int, int],
    dtype: torch.dtype = torch.float32,
    stream: str = "feature",
) -> Result:
    g = torch.Generator().manual_seed(5)
    noise = torch.randn(batch, CHANNELS, *size, generator=g)
    texts = torch.randn(2, batch, 5, 16, generator=g).to(dtype)
    model, group = transformer(dtype), ranks.group(topology)
    adapter = WanAdapter(model)
    geometry = adapter.geometry(noise)
    tokens = geometry.grid.tokens
    split = partial(attend, group=group.attention(tokens, HEADS), kernel=find_kernel("flash"))
    SelfAttention(model).split(split)
    both = Branch("cond", adapter.text(texts[0])), Branch("uncond", adapter.text(texts[1]))
    network = Network(adapter, geometry, group.branches(both), group.guidance(4.0), group.sequence(tokens))
    sampler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    sampler.set_timesteps(STEPS)
    predictor = universal().predictor(LEVELS) if schedule == "universal" else ChebyshevRidge(horizon=STEPS)
    forecasting = STREAMS[stream](network, predictor)
    coordinator = Coordinator(schedules(schedule), "", ranks)
    state = Denoising(noise, sampler, forecasting, coordinator)
    steps = list(denoise(state, ranks))
    computed = {branch.name: coordinator.computed(branch.name) for branch in both}
    return Result(state.latents_BCFHW, steps, coordinator.errors, coordinator.digests, computed)


def on_rank(ranks: Ranks, topology: Topology, schedule: str, stream: str = "feature") -> list[Result]:
    return [generate(ranks, topology, schedule, batch, size, stream=stream) for batch, size in CASES]


def alone(schedule: str, dtype: torch.dtype = torch.float32, stream: str = "feature") -> list[Result]:
    ranks = Ranks.alone(CPU)
    return [generate(ranks, Topology(), schedule, batch, size, dtype, stream) for batch, size in CASES]


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


TOPOLOGIES = [
    Topology(),
    Topology(ulysses=2),
    Topology(ring=3),
    Topology(cfg=2),
    Topology(cfg=2, ring=2),
    Topology(ring=2, ulysses=2),
]


@pytest.mark.timeout(240)
@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
def test_many_ranks_make_the_latents_of_one(topology: Topology, warm: WarmRanks) -> None:
    expected = alone("paper")
    for results in warm.run(topology.world, on_rank, topology, "paper"):
        for result, truth in zip(results, expected, strict=True):
            assert result.computed["cond"] == [0, 1, 2, 4, 6]
            assert distance(result.latents, truth.latents) < 1e-5
            assert result.digests == truth.digests * topology.world
            assert result.errors.keys() == truth.errors.keys() == {1, 2, 4, 6}
            for step, error in truth.errors.items():
                assert result.errors[step] == pytest.approx(error, rel=1e-4)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("topology", [Topology(ring=3), Topology(cfg=2, ulysses=2)], ids=str)
@pytest.mark.parametrize("schedule", ["error", "uneven"])
def test_every_schedule_decides_the_same_on_every_topology(
    topology: Topology, schedule: str, warm: WarmRanks
) -> None:
    """Schedules that go by the forecasts' errors, and branches that are not computed at the same steps."""
    expected = alone(schedule)
    assert any(step.kind is StepKind.FORECAST for result in expected for step in result.steps)
    for results in warm.run(topology.world, on_rank, topology, schedule):
        for result, truth in zip(results, expected, strict=True):
            assert result.computed == truth.computed
            assert result.digests == truth.digests * topology.world
            assert distance(result.latents, truth.latents) < 1e-5


@pytest.mark.timeout(240)
@pytest.mark.parametrize("topology", [Topology(ring=2, ulysses=2), Topology(cfg=2, ring=2)], ids=str)
@pytest.mark.parametrize(
    ("schedule", "stream"),
    [
        ("paper", "velocity"),
        ("paper", "guided"),
        ("error", "velocity"),
        ("error", "guided"),
        ("universal", "guided"),
    ],
)
def test_every_stream_is_that_of_one_rank(
    topology: Topology, stream: str, schedule: str, warm: WarmRanks
) -> None:
    expected = alone(schedule, stream=stream)
    for results in warm.run(topology.world, on_rank, topology, schedule, stream):
        for result, truth in zip(results, expected, strict=True):
            assert result.computed == truth.computed
            assert distance(result.latents, truth.latents) < 1e-5
            for step, error in truth.errors.items():
                assert result.errors[step] == pytest.approx(error, rel=1e-4)
            forecast = [step.sent for step in result.steps if step.kind is StepKind.FORECAST]
            assert forecast
            assert (set(forecast) == {0}) == (stream == "guided")  # which every rank has whole


def hurried(ranks: Ranks, topology: Topology) -> tuple[list[int], list[int]]:
    """Computed and dropped steps of a coordinator whose first rank has time for half of 20 steps."""
    schedule = FixedSchedule.full(20)
    deadline = Deadline(20 * 0.05 / 2, [StepKind.COMPUTE] * 20)
    coordinator = Coordinator({"cond": schedule}, "", ranks, deadline)
    for step in range(20):
        decision = coordinator.decide(step)
        seconds = 0.05 if decision.kind is StepKind.COMPUTE else 0.0
        time.sleep(seconds * (1 if ranks.is_leader else 0.5))  # the others' clocks do not count
        coordinator.timed(seconds)
    coordinator.finish()
    assert len(set(coordinator.digests)) == 1
    return coordinator.computed("cond"), coordinator.dropped


def test_a_deadline_drops_the_same_steps_on_every_rank(warm: WarmRanks) -> None:
    results = warm.run(3, hurried, Topology(ring=3))
    assert results[0] == results[1] == results[2]
    computed, dropped = results[0]
    assert sorted(computed + dropped) == list(range(20))
    assert 1 <= len(computed) <= 12  # 10 would fit; the machine may be slow


def in_bfloat16(ranks: Ranks, topology: Topology) -> list[torch.Tensor]:
    return [generate(ranks, topology, "paper", batch, size, torch.bfloat16).latents for batch, size in CASES]


@pytest.mark.timeout(240)
@pytest.mark.parametrize("topology", [Topology(ring=2, ulysses=2), Topology(cfg=2, ulysses=2)], ids=str)
def test_bfloat16_on_many_ranks_is_no_worse_than_on_one(topology: Topology, warm: WarmRanks) -> None:
    outputs = warm.run(topology.world, in_bfloat16, topology)[0]
    for output, half, whole in zip(outputs, alone("paper", torch.bfloat16), alone("paper"), strict=True):
        assert distance(output, whole.latents) <= 1.5 * distance(half.latents, whole.latents)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("topology", TOPOLOGIES[1:], ids=str)
def test_every_byte_is_accounted_for(topology: Topology, warm: WarmRanks) -> None:
    """A forecast step moves the output's patches and nothing else, a computed step what its axes need."""
    results = warm.run(topology.world, on_rank, topology, "paper")
    for case, (batch, size) in enumerate(CASES):
        tokens = size[0] * size[1] * size[2] // 4
        ours = [of_rank[case] for of_rank in results]
        for step in range(STEPS):
            elements = output_elements(tokens, topology)
            if ours[0].steps[step].kind is StepKind.COMPUTE:
                elements += 2 * LAYERS * attention_elements(tokens, topology)  # of two branches
            assert sum(result.steps[step].sent for result in ours) == 4 * batch * elements


def output_elements(tokens: int, topology: Topology) -> int:
    """Every rank gets every patch: those of its part from the other branch, the rest from its peers."""
    patch = 4 * CHANNELS
    joined = tokens * 2 if topology.cfg == 2 else 0
    return patch * (joined + topology.cfg * (topology.sequence - 1) * tokens)


def attention_elements(tokens: int, topology: Topology) -> int:
    """Of one layer and branch: Ulysses moves query, key, value and output, a ring keys and values."""
    shares = Split.even(tokens, topology.sequence).sizes
    heads = Split.even(HEADS, topology.ulysses).sizes
    ulysses = sum(
        4 * shares[ring * topology.ulysses + mine] * heads[theirs]
        for ring in range(topology.ring)
        for mine in range(topology.ulysses)
        for theirs in range(topology.ulysses)
        if mine != theirs
    )
    ring = 2 * (topology.ring - 1) * tokens * HEADS
    return (ulysses + ring) * HEAD_DIM


def group_size(ranks: Ranks, topology: Topology) -> str:
    with pytest.raises(ValueError, match="needs 4 ranks, there are 2") as caught:
        ranks.group(topology)
    return str(caught.value)


def test_a_topology_of_another_size_is_refused(warm: WarmRanks) -> None:
    assert len(warm.run(2, group_size, Topology(ring=4))) == 2


def test_the_odd_ones_are_found() -> None:
    assert minority(["a", "a", "a"]) is None
    assert minority(["a", "b", "a"]) == [1]
    assert minority(["b", "a", "a"]) == [0]
    assert minority(["a", "b"]) == [1]  # of a tie, rank 0 is right


def test_nested_fields_have_one_name_each() -> None:
    assert flatten({"a": {"b": 1, "c": [2]}, "d": 3}) == {"a.b": 1, "a.c": [2], "d": 3}


def arranged(ranks: Ranks, heads: int) -> tuple[int, str]:
    chosen = Topology.choose(ranks.size, heads=heads, guided=False, per_node=ranks.per_node)
    return ranks.node.size, str(chosen)


@pytest.mark.parametrize(
    ("hosts", "sizes", "chosen"),
    [
        ("aabb", [2, 2, 2, 2], Topology(ring=2, ulysses=2)),
        ("aabc", [2, 2, 1, 1], Topology(ring=4)),
        ("aaaa", [4, 4, 4, 4], Topology(ulysses=4)),
    ],
)
def test_uneven_nodes_agree_on_one_arrangement(hosts: str, sizes: list[int], chosen: Topology) -> None:
    """The largest that never exchanges heads between two machines."""
    results = run_ranks(4, arranged, 12, hosts=hosts)
    assert [size for size, _ in results] == sizes
    assert {topology for _, topology in results} == {str(chosen)}


@pytest.mark.parametrize(("world", "per_node", "chosen"), [(16, 4, (2, 2, 4)), (8, 2, (2, 2, 2))])
def test_the_arrangement_of_uneven_nodes(world: int, per_node: int, chosen: tuple[int, int, int]) -> None:
    """16 ranks on nodes of 8 + 4 + 4, and 8 on 4 + 2 + 2."""
    assert Topology.choose(world, heads=12, guided=True, per_node=per_node) == Topology(*chosen)


def groups_made(ranks: Ranks, topology: Topology) -> tuple[int, list[float]]:
    """Groups that this rank has, and how long each of them waits, in seconds."""
    group = ranks.group(topology)
    assert ranks.group(Topology(topology.cfg, topology.ulysses, topology.ring)) is not None
    assert (group._ring.group is None) == (topology.ring == 1)
    known = [g for g in dist.distributed_c10d._world.pg_map if isinstance(g, dist.ProcessGroup)]
    waits = [g._get_backend(CPU).options._timeout.total_seconds() for g in known]
    return len(known), waits


def test_ranks_with_the_same_peers_share_a_process_group() -> None:
    """2 × 1 × 2 and 2 × 2 × 1 on one node: all ranks, those for control, the cfg row, the row of tokens."""
    for number, waits in run_ranks(4, groups_made, Topology(cfg=2, ulysses=2)):
        assert number == 4
        assert min(waits) >= 86400  # the watch is what ends a wait
