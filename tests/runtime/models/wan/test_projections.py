"""Fused projections compute what separate ones do, hold no weight twice, and compile into one graph."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch._dynamo.utils import counters

from runtime.engine import Engine
from runtime.media.mp4 import FrameBuffer, Frames
from runtime.models.wan.attention import SplitSelfAttention
from runtime.models.wan.projections import fuse_projections
from runtime.parallel.attention import LocalAttention
from runtime.parallel.kernels import find_kernel
from runtime.request.config import Config, load_config
from tests.newer import DEFAULT_BACKEND

PROMPT = "a red circle moving left on a black background"
SMALL = {"width": 64, "height": 48, "frames": 5, "steps": 2, "max_sequence_length": 32, "spectrum": "paper"}


def block_of(image: bool) -> tuple[WanTransformerBlock, list[torch.Tensor]]:
    """A block with random weights, and its inputs."""
    torch.manual_seed(0)
    block = WanTransformerBlock(
        dim=64, ffn_dim=128, num_heads=2, cross_attn_norm=True, added_kv_proj_dim=64 if image else None
    )
    text = torch.randn(1, (7 if image else 0) + 512, 64)
    rotary = (torch.randn(1, 12, 1, 32), torch.randn(1, 12, 1, 32))
    return block.eval().requires_grad_(False), [torch.randn(1, 12, 64), text, torch.randn(1, 6, 64), rotary]  # type: ignore[list-item]


@pytest.mark.parametrize("image", [False, True], ids=["text", "image"])
@pytest.mark.parametrize("own", [True, False], ids=["diffusers", "lockstep"])
def test_fused_projections_change_rounding_at_most(image: bool, own: bool) -> None:
    """With diffusers' processor and with ours, for self- and cross-attention."""
    block, inputs = block_of(image)
    if not own:
        block.attn1.set_processor(SplitSelfAttention(LocalAttention(find_kernel("sdpa"))))
    expected, before = block(*inputs), sum(one.numel() for one in block.parameters())
    fuse_projections(block)
    fuse_projections(block)  # again: nothing is left to do
    assert torch.allclose(block(*inputs), expected, rtol=1e-5, atol=1e-5)
    assert sum(one.numel() for one in block.parameters()) == before
    names = {name for name, _ in block.named_parameters()}
    assert {"attn1.to_qkv.weight", "attn2.to_kv.bias", "attn2.to_q.weight"} <= names
    assert ("attn2.to_added_kv.weight" in names) is image
    assert not any(name.startswith(("attn1.to_q.", "attn2.to_k.", "attn2.add_k_proj.")) for name in names)


def video(config: Config) -> Frames:
    engine, sink = Engine(config), FrameBuffer()
    engine.generate(config.request(PROMPT, **SMALL), [sink])
    return sink.frames


@DEFAULT_BACKEND
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "changes",
    [{"attention": "flash"}, {"attention": "flash", "quantization": "int8"}, {"performance": "fast"}],
    ids=lambda changes: "-".join(changes.values()),
)
def test_a_block_on_one_rank_is_one_graph(changes: dict[str, Any]) -> None:
    """Attention by any kernel is in it, and all blocks share it."""
    torch.compiler.reset()
    counters.clear()
    torch.compiler.set_default_backend("eager")
    try:
        config = load_config("wan-tiny").model_copy(update=changes)
        frames = video(config.model_copy(update={"compile": True}))
    finally:
        torch.compiler.set_default_backend(None)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    plain = config.model_copy(update={"compile": False})
    assert np.mean((frames.astype(float) - video(plain)) ** 2) < 1.0
