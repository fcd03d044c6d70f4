"""Exchanges of split attention that run beside the projections which follow."""

from __future__ import annotations

import pytest
import torch
from diffusers import WanTransformer3DModel

from runtime.engine import Engine
from runtime.models.wan.adapter import WanAdapter
from runtime.models.wan.attention import SelfAttention
from runtime.models.wan.projections import fuse_projections
from runtime.parallel.attention import SplitAttention
from runtime.parallel.collectives import Peers
from runtime.parallel.kernels import find_kernel
from runtime.parallel.ranks import Ranks
from runtime.parallel.topology import Degrees, Topology
from runtime.request.config import load_config
from runtime.request.video_request import BRANCHES
from runtime.sampling.network import Branch, Network
from runtime.sampling.result import Result
from runtime.sampling.segments import denoise_segments
from tests.ranks import WarmRanks

HEADS, LAYERS = 5, 2  # heads do not divide by two, nor tokens by four
LATENT = (1, 16, 2, 6, 10)
TOPOLOGIES = [Topology(ulysses=2), Topology(ring=2, ulysses=2), Topology(cfg=2, ulysses=2), Topology(ring=2)]


def transformer(fused: bool) -> WanTransformer3DModel:
    torch.manual_seed(0)
    sizes = {"num_attention_heads": HEADS, "attention_head_dim": 12, "num_layers": LAYERS, "ffn_dim": 48}
    model = WanTransformer3DModel(**sizes, text_dim=16, freq_dim=16).eval()
    if fused:
        for block in model.blocks:
            fuse_projections(block)
    return model


@torch.no_grad()
def evaluate(
    ranks: Ranks, topology: Topology, fused: bool, overlaps: bool
) -> tuple[list[torch.Tensor], dict[str, int], list[str]]:
    """Features of this rank's branches, bytes sent, and what happened in the first block, in its order."""
    model, group, told = transformer(fused), ranks.group(topology), list[str]()
    adapter, noise = WanAdapter(model), torch.randn(LATENT, generator=torch.Generator().manual_seed(1))
    geometry = adapter.geometry(noise)
    tokens = geometry.grid.tokens
    attention = SelfAttention(model, overlaps=overlaps)
    attention.split(SplitAttention(group.attention(tokens, HEADS), find_kernel("flash")))
    first = model.blocks[0].attn1
    for name in () if fused else ("to_q", "to_k", "to_v"):
        getattr(first, name).register_forward_hook(lambda *_, name=name: told.append(name))
    texts = torch.randn(2, 1, 5, 16, generator=torch.Generator().manual_seed(2))
    named = (Branch(name, adapter.text(text)) for name, text in zip(BRANCHES, texts, strict=True))
    branches = group.branches(tuple(named))
    network = Network(adapter, geometry, branches, group.guidance(4.0), group.sequence(tokens))
    before, start = dict(ranks.traffic.axes), Peers.start_joined

    def heard(peers: Peers, *given: object) -> object:
        told.append("send")
        return start(peers, *given)  # type: ignore[arg-type]

    Peers.start_joined = heard  # type: ignore[assignment,method-assign]
    try:
        made = network.features(branches, noise, network.time(torch.tensor([700.0])))
    finally:
        Peers.start_joined = start  # type: ignore[method-assign]
    sent = {axis: total - before.get(axis, 0) for axis, total in ranks.traffic.axes.items()}
    return made, sent, told


def both(ranks: Ranks, topology: Topology, fused: bool) -> tuple[bool, bool, list[str], list[str]]:
    """Whether bits and bytes are equal with and without, and the order of events of each."""
    one, two = (evaluate(ranks, topology, fused, overlaps) for overlaps in (False, True))
    same = all(torch.equal(a, b) for a, b in zip(one[0], two[0], strict=True))
    return same, one[1] == two[1], one[2], two[2]


@pytest.mark.timeout(240)
@pytest.mark.parametrize("fused", [False, True], ids=["separate", "fused"])
@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
def test_no_bit_and_no_byte_changes(topology: Topology, fused: bool, warm: WarmRanks) -> None:
    for same, as_many, _, _ in warm.run(topology.world, both, topology, fused):
        assert same and as_many


@pytest.mark.timeout(240)
def test_values_and_keys_are_under_way_while_the_next_projection_is_computed(warm: WarmRanks) -> None:
    for _, _, without, overlapped in warm.run(2, both, Topology(ulysses=2), False):
        assert without[:4] == ["to_q", "to_k", "to_v", "send"]
        assert overlapped[:6] == ["to_v", "send", "to_k", "send", "to_q", "send"]


def video(ranks: Ranks, overlaps: bool) -> tuple[torch.Tensor, bool]:
    """Latents of a video by the engine, and whether the report's setting says that exchanges overlap."""
    config = load_config("wan-tiny").model_copy(update={"overlap_exchanges": overlaps})
    engine = Engine(config, ranks, Degrees(cfg=1, ulysses=2))
    given = {"width": 64, "height": 48, "frames": 5, "steps": 3, "spectrum": "off", "max_sequence_length": 32}
    run = engine.prepare(engine.plan(config.request("a red circle", **given)))
    return denoise_segments(ranks, run, Result(run.plan)), config.performs.overlap_exchanges


@pytest.mark.timeout(240)
def test_a_config_turns_it_on_for_whole_videos(warm: WarmRanks) -> None:
    usual, overlapped = (warm.run(2, video, overlaps) for overlaps in (False, True))
    for (one, is_off), (two, is_on) in zip(usual, overlapped, strict=True):
        assert not is_off and is_on and torch.equal(one, two)
