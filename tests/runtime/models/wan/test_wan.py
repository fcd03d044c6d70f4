"""The adapter's pieces together are the model's own forward, bit for bit."""

from __future__ import annotations

import pytest
import torch
from diffusers import WanTransformer3DModel

from runtime.models.wan.adapter import VaceAdapter, WanAdapter, open_adapter
from tests.conditioned import vace_transformer


def model(dtype: torch.dtype) -> WanTransformer3DModel:
    torch.manual_seed(0)
    return (
        WanTransformer3DModel(
            num_attention_heads=3, attention_head_dim=16, num_layers=2, ffn_dim=64, text_dim=24, freq_dim=32
        )
        .to(dtype)
        .eval()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("shape", [(1, 2, 2), (3, 4, 6), (2, 10, 4)])
@torch.no_grad()
def test_embed_blocks_head_equal_forward(dtype: torch.dtype, batch: int, shape: tuple[int, int, int]) -> None:
    transformer = model(dtype)
    adapter = open_adapter(transformer)
    assert type(adapter) is WanAdapter
    g = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, 16, *shape, generator=g).to(dtype)
    embeddings = torch.randn(batch, 7, 24, generator=g).to(dtype)
    timestep = torch.tensor(713.0).expand(batch)

    expected = transformer(latents, timestep, embeddings, return_dict=False)[0]
    time, geometry = adapter.time(timestep), adapter.geometry(latents)
    feature = adapter.blocks(adapter.embed(latents), adapter.text(embeddings), time, geometry.rotary)

    assert feature.shape == (batch, geometry.grid.tokens, 3 * 16)
    assert torch.equal(adapter.unpatchify(adapter.project(feature, time), geometry.grid), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_pieces_of_vace_equal_its_forward(dtype: torch.dtype) -> None:
    transformer = vace_transformer().to(dtype)
    adapter = open_adapter(transformer)
    assert type(adapter) is VaceAdapter
    g = torch.Generator().manual_seed(1)
    latents, control = (torch.randn(2, c, 3, 4, 6, generator=g).to(dtype) for c in (16, 96))
    embeddings, timestep = torch.randn(2, 7, 64, generator=g).to(dtype), torch.tensor(713.0).expand(2)

    expected = transformer(latents, timestep, embeddings, control_hidden_states=control).sample
    time, geometry = adapter.time(timestep), adapter.geometry(latents)
    tokens = adapter.embed(latents, control)
    feature = adapter.blocks(tokens, adapter.text(embeddings), time, geometry.rotary)

    assert torch.equal(adapter.unpatchify(adapter.project(feature, time), geometry.grid), expected)
    with pytest.raises(ValueError, match="VACE needs control latents"):
        adapter.embed(latents)
