"""xfuser's USP on Lockstep's own process groups. Runs where xfuser is installed, also without a GPU.

Without one xfuser asserts that there is an accelerator while it is imported, and triton is not there: only
these are made up, and the kernel is one of ours, as its own are CUDA's.
`pip install --no-deps --target DIR xfuser==0.7.0 yunchang==0.6.4 einops distvae`, and DIR in PYTHONPATH, are
enough.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from types import SimpleNamespace
from unittest.mock import MagicMock, patch

import pytest
import torch
import torch.nn.functional as F

from runtime.errors import BadRequestError
from runtime.parallel.kernels import find_kernel
from runtime.parallel.ranks import Ranks
from runtime.parallel.topology import Topology
from tests.ranks import run_ranks

HEADS, TOKENS = 4, 12
_MISSING = ("triton", "triton.language", "av", "sentencepiece")

pytestmark = [
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("xfuser", "yunchang")),
        reason="needs xfuser and yunchang",
    ),
    pytest.mark.timeout(240),
]


def import_xfuser() -> None:
    """Import it with an accelerator that is made up, where there is none."""
    if torch.cuda.is_available():
        return
    import diffusers  # noqa: F401  these look for triton themselves
    import transformers  # noqa: F401

    for name in _MISSING:
        module = MagicMock()
        module.__spec__, module.__path__ = importlib.machinery.ModuleSpec(name, None), []
        sys.modules.setdefault(name, module)
    card = SimpleNamespace(gcnArchName="", major=9, minor=0)
    fake = {
        "is_available": lambda: True,
        "get_device_name": lambda *_: "NVIDIA H100",
        "get_device_capability": lambda *_: (9, 0),
        "device_count": lambda: 8,
        "current_device": lambda: 0,
        "get_device_properties": lambda *_: card,
    }
    with patch.multiple(torch.cuda, **fake), patch.object(torch.version, "cuda", "12.8"):
        importlib.import_module("xfuser.model_executor.layers.usp")


def attend_on_rank(ranks: Ranks, topologies: list[Topology]) -> list[float]:
    """How far USP is from attention to the whole sequence, for one topology after the other."""
    import_xfuser()
    from xfuser.core.distributed.attention_backend import ATTENTION_FUNCTION_REGISTRY, AttentionBackendType

    from runtime.parallel.usp import UspAttention

    kernel = find_kernel("math")

    def call(query, key, value, dropout_p, is_causal, attention_kwargs=None):  # type: ignore[no-untyped-def]
        return kernel(query, key, value)

    ATTENTION_FUNCTION_REGISTRY[AttentionBackendType.SDPA_FLASH] = call
    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, TOKENS, HEADS, 8, generator=g) for _ in range(3)]
    query, key, value = (x.transpose(1, 2) for x in inputs)
    whole = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
    off = []
    for topology in topologies:
        group = ranks.group(topology)
        sequence, place = group.sequence(TOKENS), group.attention(TOKENS, HEADS)
        usp = UspAttention(place, "SDPA_FLASH")
        assert usp == UspAttention(group.attention(TOKENS, HEADS), "SDPA_FLASH")
        assert hash(usp) == hash(UspAttention(group.attention(TOKENS, HEADS), "SDPA_FLASH"))
        own = usp(*(sequence.shard(x) for x in inputs))
        off.append(float((sequence.gather(own.contiguous()) - whole).abs().max()))
        with pytest.raises(BadRequestError, match="cannot split 13 tokens"):
            UspAttention(group.attention(TOKENS + 1, HEADS), "SDPA_FLASH")
    return off


@pytest.mark.parametrize("world", [2, 4])
def test_usp_is_whole_attention_in_every_topology_of_one_process(world: int) -> None:
    degrees = [(1, world), (world, 1), (2, world // 2)]
    topologies = [Topology(ring=ring, ulysses=ulysses) for ring, ulysses in degrees]
    for off in run_ranks(world, attend_on_rank, topologies):
        assert max(off) < 1e-6
