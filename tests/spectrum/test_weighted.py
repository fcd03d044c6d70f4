"""The weighted sum: chunks, devices, and how little an accelerator is told to do."""

from __future__ import annotations

import pytest
import torch

from spectrum.weighted import _CHUNK_ACCELERATOR, _CHUNK_CPU, fetched, sum_on_accelerator, weighted_sum
from tests.launches import Launches

WEIGHTS = [0.5, -1.0, 2.0, 0.25, -0.75]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def values(size: int, dtype: torch.dtype) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=g, dtype=torch.float64).to(dtype) for _ in WEIGHTS]


def exact(several: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([w * v.double() for w, v in zip(WEIGHTS, several, strict=True)]).sum(0)


@pytest.mark.parametrize("size", [1, _CHUNK_CPU - 1, _CHUNK_CPU, _CHUNK_CPU + 1, 2 * _CHUNK_CPU + 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_leave_no_seam(size: int, dtype: torch.dtype) -> None:
    several = values(size, dtype)
    torch.testing.assert_close(
        weighted_sum(WEIGHTS, several).double(), exact(several), rtol=torch.finfo(dtype).eps, atol=1e-6
    )


@pytest.mark.parametrize("chunk", [1000, 300, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_an_accelerator_sums_what_the_cpu_does(chunk: int, dtype: torch.dtype) -> None:
    """The same code, run here; float32 accumulation and one rounding, as on the CPU."""
    several, result = values(1000, dtype), torch.empty(1000, dtype=dtype)
    sum_on_accelerator(result, WEIGHTS, several, chunk)
    torch.testing.assert_close(result.double(), exact(several), rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_what_is_fetched_arrives_in_order(count: int) -> None:
    several = [torch.full((7,), float(number)) for number in range(count)]
    arrived = [piece.clone() for piece in fetched(several, torch.device("cpu"))]
    assert all(torch.equal(there, here) for there, here in zip(arrived, several, strict=True))


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_gives_the_sum_of_the_cpu(dtype: torch.dtype) -> None:
    several = values(3_000_000, dtype)
    expected = weighted_sum(WEIGHTS, several)
    pinned = [value.pin_memory() for value in several]
    for found in (
        weighted_sum(WEIGHTS, [value.cuda() for value in several]),
        weighted_sum(WEIGHTS, several, torch.device("cuda", 0)),
        weighted_sum(WEIGHTS, pinned, torch.device("cuda", 0)),
    ):
        torch.testing.assert_close(found.cpu(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("chunks", [1, 6])
def test_an_accelerator_is_told_once_for_each_value(chunks: int) -> None:
    """No weight is copied to it, so it is not waited for."""
    several = [torch.empty(chunks * _CHUNK_ACCELERATOR, dtype=torch.bfloat16, device="meta")] * len(WEIGHTS)
    with Launches() as launches:
        weighted_sum(WEIGHTS, several)
    assert launches.names.count("add_") == chunks * len(WEIGHTS)
    assert len(launches.names) == chunks * (len(WEIGHTS) + 2)
