"""Attention kernels by name: each computes what it says, and none is replaced by another in silence."""

from __future__ import annotations

import pytest
import torch

from runtime.errors import BadRequestError
from runtime.kernels import find_kernel, resolve

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
        ("sdpa", CPU, torch.float32, 2, "log-sum-exp, as ring > 1 needs"),
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
    assert resolve("auto", device, dtype, ring=ring) == chosen
    assert resolve(chosen, device, dtype, ring=ring) == chosen
