"""One generation on many ranks is that of one: the latents agree, whatever divides, whatever is skipped."""

from __future__ import annotations

import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanTransformer3DModel

from runtime.attention import SplitSelfAttention, sdpa
from runtime.coordinator import Coordinator
from runtime.denoise import Denoising, denoise
from runtime.guidance import LocalGuidance, NoGuidance
from runtime.ranks import RankGroup
from runtime.streams import Branch, FeatureStream, Network
from runtime.topology import Topology
from runtime.wan import WanAdapter
from spectrum import ChebyshevRidge, FixedSchedule, paper_schedule
from tests.ranks import run_ranks

STEPS, HEADS = 8, 5
CASES = [(1, (2, 4, 6)), (2, (3, 6, 2))]  # batch and latent size: 12 and 9 tokens


def transformer() -> WanTransformer3DModel:
    torch.manual_seed(0)
    return WanTransformer3DModel(
        num_attention_heads=HEADS, attention_head_dim=12, num_layers=2, ffn_dim=48, text_dim=16, freq_dim=16
    ).eval()


@torch.no_grad()
def latents(
    schedule: FixedSchedule, batch: int, size: tuple[int, int, int], ranks: RankGroup | None
) -> torch.Tensor:
    """Denoise on this rank's share, or on one rank alone."""
    g = torch.Generator().manual_seed(5)
    noise, texts = torch.randn(batch, 16, *size, generator=g), torch.randn(2, batch, 5, 16, generator=g)
    model = transformer()
    adapter = WanAdapter(model)
    geometry = adapter.geometry(noise)
    both = Branch("cond", adapter.text(texts[0])), Branch("uncond", adapter.text(texts[1]))
    if ranks is None:
        network = Network(adapter, geometry, both, LocalGuidance(4.0))
    else:
        tokens = geometry.grid.tokens
        SplitSelfAttention.install(model, ranks.attention(tokens, HEADS), sdpa)
        network = Network(
            adapter, geometry, ranks.branches(both), ranks.guidance(4.0), ranks.sequence(tokens)
        )
    sampler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    sampler.set_timesteps(STEPS)
    state = Denoising(noise)
    stream = FeatureStream(network, ChebyshevRidge(horizon=STEPS))
    for _ in denoise(state, sampler, stream, Coordinator(schedule, "")):
        pass
    return state.latents_BCFHW


def on_rank(rank: int, topology: Topology, schedule: FixedSchedule) -> list[torch.Tensor]:
    ranks = RankGroup(topology, "cpu")
    return [latents(schedule, batch, size, ranks) for batch, size in CASES]


TOPOLOGIES = [
    Topology(ulysses=2),
    Topology(ring=3),
    Topology(cfg=2),
    Topology(cfg=2, ring=2),
    Topology(ring=2, ulysses=2),
]


@pytest.mark.timeout(240)
@pytest.mark.parametrize("topology", TOPOLOGIES, ids=lambda t: f"cfg{t.cfg}-ring{t.ring}-ulysses{t.ulysses}")
def test_many_ranks_make_the_latents_of_one(topology: Topology) -> None:
    schedule = paper_schedule(STEPS, warmup=3)
    assert schedule.nfe < STEPS
    expected = [latents(schedule, batch, size, None) for batch, size in CASES]
    for results in run_ranks(topology.world, on_rank, topology, schedule):
        for result, truth in zip(results, expected, strict=True):
            assert (result - truth).norm() / truth.norm() < 1e-5


def group_size(rank: int, topology: Topology) -> str:
    with pytest.raises(ValueError, match="needs 4 ranks, there are 2") as caught:
        RankGroup(topology, "cpu")
    return str(caught.value)


def test_a_topology_of_another_size_is_refused() -> None:
    assert len(run_ranks(2, group_size, Topology(ring=4))) == 2


def test_without_guidance_the_one_branch_is_the_result() -> None:
    value = torch.ones(3)
    assert NoGuidance().join([value]) is value
