"""The cost model against torch's own count of operations, and against its limits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cost_model import Machine, Shape, computed_bytes, computed_seconds, forecast_seconds, output_bytes
from diffusers import WanTransformer3DModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from runtime.models.wan.adapter import WanAdapter
from runtime.parallel.topology import Topology

SHAPE = Shape(tokens=96, layers=2, width=48, heads=4, ffn=64, text=10, branches=2, element=4)
FREE = Machine(1e12, 1e30, 1e30, 1e30, 0.0, 8, 0.0)


@torch.no_grad()
def test_operations_are_those_that_torch_counts() -> None:
    model = WanTransformer3DModel(
        num_attention_heads=4, attention_head_dim=12, num_layers=2, ffn_dim=64, text_dim=16, freq_dim=16
    ).eval()
    adapter, latents = WanAdapter(model), torch.randn(1, 16, 4, 8, 12)
    geometry, time = adapter.geometry(latents), adapter.time(torch.tensor([500.0]))
    assert geometry.grid.tokens == SHAPE.tokens
    tokens, text = adapter.embed(latents), adapter.text(torch.randn(1, SHAPE.text, 16))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # fused ones go uncounted
        adapter.blocks(tokens, text, time, geometry.rotary)
    expected = SHAPE.layers * (SHAPE.layer_flops + SHAPE.attention_flops)
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("topology", [Topology(2, 2, 2), Topology(1, 4, 2), Topology(ulysses=8)])
def test_without_transfers_ranks_share_the_work_evenly(topology: Topology) -> None:
    alone = computed_seconds(SHAPE, Topology(), FREE)
    assert computed_seconds(SHAPE, topology, FREE) == pytest.approx(alone / 8, rel=1e-9)


def test_transfers_cost_what_they_weigh() -> None:
    slow = replace(FREE, flops=1e30, link=1e3)
    topology = Topology(ulysses=4)
    assert computed_seconds(SHAPE, topology, slow) == pytest.approx(
        computed_bytes(SHAPE, topology) / topology.world / 1e3
    )
    assert forecast_seconds(SHAPE, topology, slow, remembered=5) == pytest.approx(
        output_bytes(SHAPE, topology) / topology.world / 1e3
    )


def test_a_ring_hides_its_transfers_behind_attention_while_it_lasts() -> None:
    topology = Topology(ring=4)
    fast, slow = replace(FREE, link=1e15), replace(FREE, link=1e6)
    assert computed_seconds(SHAPE, topology, fast) == pytest.approx(
        computed_seconds(SHAPE, topology, FREE), rel=1e-3
    )
    assert computed_seconds(SHAPE, topology, slow) > 2 * computed_seconds(SHAPE, topology, FREE)


def test_other_nodes_are_farther() -> None:
    far = replace(FREE, link=1e9, network=1e6)
    near = computed_seconds(SHAPE, Topology(ulysses=8), far)
    assert computed_seconds(SHAPE, Topology(ulysses=16), far) > 10 * near
