"""Transformers that several ranks share: all of them take the same decisions. Real processes, with gloo."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from diffusers.hooks.context_parallel import apply_context_parallel
from diffusers.hooks.tensor_parallel import _resolve_tp_plan, _styles
from diffusers.models._modeling_parallel import ParallelConfig
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module

from spectrum.diffusers import Report, enable, report
from tests.pipelines import Tiny, flux, noise
from tests.ranks import Ranks, WarmRanks

ERRORS = {"schedule": {"kind": "error", "tolerance": 0.5}}
STEPS = 20
PROMPT = noise(1, 6, 32)  # diffusers wants as many tokens on every rank


@pytest.fixture(scope="module")
def warm() -> Iterator[WarmRanks]:
    ranks = WarmRanks()
    yield ranks
    ranks.close()


def split_tokens(tiny: Tiny, world: int) -> None:
    """Context parallelism as `enable_parallelism` sets it up, which itself wants accelerators."""
    transformer = tiny.pipe.transformer
    config = ParallelConfig(context_parallel_config=ContextParallelConfig(ulysses_degree=world))
    mesh = init_device_mesh("cpu", (1, world), mesh_dim_names=("ring", "ulysses"))
    config.setup(dist.get_rank(), world, torch.device("cpu"), mesh=mesh)
    transformer._parallel_config = config
    for module in transformer.modules():
        if hasattr(getattr(module, "processor", None), "_parallel_config"):
            module.processor._parallel_config = config
    apply_context_parallel(transformer, config.context_parallel_config, transformer._cp_plan)


def shard_weights(tiny: Tiny, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    transformer = tiny.pipe.transformer
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        fully_shard(block, mesh=mesh)
    fully_shard(transformer, mesh=mesh)


def split_weights(tiny: Tiny, world: int) -> None:
    """Tensor parallelism as `enable_parallelism` sets it up, which itself wants accelerators."""
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
    transformer = tiny.pipe.transformer
    for module, plan in _resolve_tp_plan(transformer, transformer._tp_plan):
        parallelize_module(module, mesh, _styles(plan))


SHARED = {"context parallel": split_tokens, "FSDP": shard_weights, "tensor parallel": split_weights}


def generate(ranks: Ranks | None, how: str, preset: Any, stream: str) -> tuple[torch.Tensor, Report]:
    tiny = flux()
    if ranks is not None:
        SHARED[how](tiny, dist.get_world_size())
    reduce = dist.all_reduce if ranks is not None else None
    enable(tiny.pipe, preset, stream=stream, reduce=reduce)
    with torch.no_grad():
        return tiny.run(STEPS, prompt_embeds=PROMPT), report(tiny.pipe)["transformer"]


@pytest.mark.parametrize("stream", ["feature", "velocity"])
@pytest.mark.parametrize("how", SHARED)
@pytest.mark.parametrize("preset", ["paper", ERRORS], ids=["fixed", "errors"])
def test_ranks_decide_together(warm: WarmRanks, preset: Any, how: str, stream: str) -> None:
    expected, told = generate(None, how, preset, stream)
    assert 5 < told.nfe < STEPS - 3
    results = warm.run(2, generate, how, preset, stream)
    for latents, of_rank in results:
        assert of_rank.computed == told.computed
        torch.testing.assert_close(latents, expected, rtol=1e-3, atol=1e-4)
    if how == "context parallel" and stream == "feature":  # a part each, and errors of its own
        assert [of_rank.bytes * 2 for _, of_rank in results] == [told.bytes] * 2
        assert results[0][1].errors != results[1][1].errors
