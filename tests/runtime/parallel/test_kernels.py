"""Attention kernels by name: each computes what it says, and none is replaced by another in silence."""

from __future__ import annotations

import pytest
import torch

from runtime.errors import BadRequestError
from runtime.parallel.kernels import Card, choose, find_kernel, refuse_old_cudnn, resolve, why_not

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def inputs(device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 9, 16), (2, 3, 37, 16), (2, 3, 37, 16))
    query, key, value = (torch.randn(shape, generator=g).to(device, dtype) for shape in shapes)
    return query, key, value


def check(name: str, device: torch.device, dtype: torch.dtype, tolerance: float) -> None:
    query, key, value = inputs(device, dtype)
    output, log_sum = find_kernel(name)(query, key, value)
    scores = query.double() @ key.double().transpose(-1, -2) / 4.0
    truth = scores.softmax(-1) @ value.double()
    assert (output.double() - truth).norm() / truth.norm() < tolerance
    if name != "sdpa":
        assert log_sum is not None
        assert (log_sum.double() - scores.logsumexp(-1)).abs().max() < tolerance * 10


@pytest.mark.parametrize("name", ["sdpa", "flash", "math"])
def test_a_kernel_gives_attention_and_its_log_sum(name: str) -> None:
    check(name, CPU, torch.float32, 1e-6)
    check(name, CPU, torch.bfloat16, 1e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["sdpa", "flash", "efficient", "cudnn", "math"])
def test_a_kernel_on_a_gpu(name: str) -> None:
    check(name, CUDA, torch.bfloat16, 1e-2)


@pytest.mark.parametrize(
    ("name", "device", "dtype", "ring", "said"),
    [
        ("flesh", CPU, torch.float32, 1, "must be one of auto, sdpa, flash"),
        ("cudnn", CPU, torch.float32, 1, "runs on cuda only"),
        ("flash", CUDA, torch.float32, 1, "does not take torch.float32 on cuda"),
        ("cudnn", CUDA, torch.float32, 1, "does not take torch.float32 on cuda"),
        ("sdpa", CPU, torch.float32, 2, "log-sum-exp, which ring > 1 needs"),
        ("xfuser", CPU, torch.float32, 1, "xfuser needs CUDA"),
        ("xfuser:FLASH_3", CPU, torch.float32, 2, "xfuser needs CUDA"),
    ],
)
def test_what_cannot_run_is_refused(
    name: str, device: torch.device, dtype: torch.dtype, ring: int, said: str
) -> None:
    with pytest.raises(BadRequestError, match=said):
        resolve(name, device, dtype, ring=ring)


@pytest.mark.parametrize(
    ("device", "dtype", "ring", "chosen"),
    [
        (CPU, torch.float32, 1, "sdpa"),
        (CPU, torch.bfloat16, 2, "flash"),
        (CUDA, torch.bfloat16, 2, "flash"),
        (CUDA, torch.float32, 2, "efficient"),
    ],
)
def test_auto_says_what_it_took(device: torch.device, dtype: torch.dtype, ring: int, chosen: str) -> None:
    assert choose(device, dtype, ring, None) == chosen
    assert resolve(chosen, device, dtype, ring=ring) == chosen


@pytest.mark.parametrize(
    ("card", "dtype", "chosen"),
    [
        (Card((9, 0), 91501), torch.bfloat16, "cudnn"),
        (Card((10, 0), 91900), torch.float16, "cudnn"),
        (Card((9, 0), 91500), torch.bfloat16, "flash"),
        (Card((8, 0), 91900), torch.bfloat16, "flash"),
        (Card((9, 0), 91900), torch.float32, "efficient"),
    ],
)
def test_a_ring_takes_cudnn_where_it_is_fastest_and_right(
    card: Card, dtype: torch.dtype, chosen: str
) -> None:
    assert choose(CUDA, dtype, 2, card) == chosen
    assert choose(CUDA, dtype, 1, card) == "sdpa"
    without_ring = chosen if chosen == "cudnn" else "sdpa"
    assert choose(CUDA, dtype, 1, card, fastest=True) == without_ring


def test_a_cudnn_that_is_wrong_is_refused() -> None:
    refuse_old_cudnn("cudnn", Card((9, 0), 91501))
    refuse_old_cudnn("flash", Card((9, 0), 0))
    with pytest.raises(BadRequestError, match=r"cuDNN 91300 computes .*, 9\.15\.1"):
        refuse_old_cudnn("cudnn", Card((9, 0), 91300))


def test_a_kernel_that_is_not_there_is_found_at_the_door() -> None:
    """By using it: this build of torch has cuDNN's operator, and nothing that runs it."""
    reason = why_not("cudnn", CPU, torch.bfloat16, ring=1)
    assert reason is not None and reason.startswith("it does not run on cpu with torch.bfloat16 (")
    assert why_not("flash", CPU, torch.bfloat16, ring=2) is None
    assert why_not("sdpa", CPU, torch.float32, ring=1) is None
    assert (
        why_not("sdpa", CPU, torch.float32, ring=2)
        == "it does not return its log-sum-exp, which ring > 1 needs"
    )
