"""Checks of the device itself: its speeds, and each attention kernel at the models' shapes.

Tensor legend: B batch, h heads, U query tokens, V key tokens, D channels of a head, r some of the queries.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from gpu_bench import Bench, Found

from runtime.parallel.kernels import KERNELS, Kernel, card_of, find_kernel, resolve, why_not

SHAPES = {  # name → heads, tokens; what one rank's attention sees
    "14B 480p, one GPU": (40, 32_760),
    "1.3B 480p, one GPU": (12, 32_760),
    "14B 720p, cfg 2 × ulysses 4": (10, 75_600),
}
SMALL_SHAPES = {"2 heads, 1,000 tokens": (2, 1_000)}
HEAD_DIM, SEEN = 128, 64  # channels of a head; queries that are compared with float64
SLOW = ("math",)  # holds the whole matrix
XFUSER = ("xfuser:FLASH", "xfuser:FLASH_3", "xfuser:SAGE", "xfuser:CUDNN")


def check_ceilings(bench: Bench) -> Found:
    """Measure copies, products of matrices, and transfers from pinned host memory."""
    device, size = bench.device, 512 if bench.small else 8192
    found: Found = {}
    found["copy_gbps"] = 2 * _copies(bench, "device", "device") / 1e9
    if bench.on_gpu:
        found["from_host_gbps"] = _copies(bench, "host", "device") / 1e9
        found["to_host_gbps"] = _copies(bench, "device", "host") / 1e9
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    found["bfloat16_tflops"] = 2 * size**3 / bench.seconds(lambda: left @ right) / 1e12
    if bench.on_gpu and card_of(device) >= ((8, 9), 0):  # type: ignore[operator]
        eight, other = (x.to(torch.float8_e4m3fn) for x in (left, right))
        rows, columns = (torch.ones(shape, device=device) for shape in ((size, 1), (1, size)))

        def product() -> torch.Tensor:
            return torch._scaled_mm(eight, other.T, rows, columns, out_dtype=torch.bfloat16)

        found["float8_rowwise_tflops"] = 2 * size**3 / bench.seconds(product) / 1e12
    return found


def _copies(bench: Bench, source: str, target: str) -> float:
    """Bytes per second of copies between the device and pinned host memory, or within the device."""

    def made(where: str) -> torch.Tensor:
        size = 2**20 if bench.small else 2**28
        if where == "host":
            return torch.zeros(size, pin_memory=True)
        return torch.randn(size, device=bench.device)

    own, other = made(source), made(target)
    return own.nbytes / bench.seconds(lambda: other.copy_(own, non_blocking=True))


def check_attention(bench: Bench) -> Found:
    """Time each kernel that runs here, and compare its output and log-sum-exp with float64."""
    dtype = torch.bfloat16 if bench.on_gpu else torch.float32
    names, refused = [], {}
    for name in (*KERNELS, *XFUSER):
        if name in SLOW and not bench.small:
            continue
        try:
            resolve(name, bench.device, dtype, ring=1)
            reason = why_not(name, bench.device, dtype, ring=1)
        except Exception as error:
            reason = str(error)
        if reason is None:
            names.append(name)
        else:
            refused[name] = reason
    shapes = SMALL_SHAPES if bench.small else SHAPES
    rows = [
        _measure(bench, name, find_kernel(name), shape, sizes, dtype)
        for shape, sizes in shapes.items()
        for name in names
    ]
    automatic = {str(ring): resolve("auto", bench.device, dtype, ring=ring) for ring in (1, 2)}
    return {"dtype": str(dtype), "kernels": rows, "refused": refused, "auto": automatic}


def _measure(
    bench: Bench, name: str, kernel: Kernel, shape: str, sizes: tuple[int, int], dtype: torch.dtype
) -> Found:
    heads, tokens = sizes
    generator = torch.Generator(bench.device).manual_seed(0)

    def drawn() -> torch.Tensor:
        whole = torch.randn(1, tokens, heads, HEAD_DIM, device=bench.device, generator=generator)
        return whole.to(dtype).transpose(1, 2)  # `[B, h, U, D]` in the strides that the models give

    query, key, value = drawn(), drawn(), drawn()
    found: Found = {"shape": shape, "kernel": name}
    try:
        output, log_sum = kernel(query, key, value)
        error, log_sum_error = _errors(query, key, value, output, log_sum)
        found |= {"error": error, "log_sum_error": log_sum_error}
        seconds = bench.seconds(lambda: kernel(query, key, value), rounds=3)
        found |= {"ms": 1000 * seconds, "tflops": 4 * heads * tokens**2 * HEAD_DIM / seconds / 1e12}
        ran = bench.kernels(lambda: kernel(query, key, value), most=1)
        found["ran"] = ran[0]["kernel"] if ran else ""
    except Exception as error:  # one kernel that fails says nothing of the others
        found["failed"] = f"{type(error).__name__}: {error}"[:300]
    return found


def _errors(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    log_sum: torch.Tensor | None,
) -> tuple[float, float | None]:
    """Relative error of the output, and the largest of the log-sum-exp, at the first and last queries."""
    half = SEEN // 2

    def rows(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[:, :2, :half], x[:, :2, -half:]], dim=2).double()

    keys, values = (x[:, :2].double() for x in (key, value))
    scores_BhrV = rows(query) @ keys.transpose(-1, -2) / math.sqrt(query.shape[-1])
    expected = scores_BhrV.softmax(-1) @ values
    error = (rows(output) - expected).norm() / expected.norm()
    if log_sum is None:
        return float(error), None
    true = scores_BhrV.logsumexp(-1)
    return float(error), float((rows(log_sum.unsqueeze(-1)).squeeze(-1) - true).abs().max())


CHECKS: dict[str, Callable[[Bench], Found]] = {"ceilings": check_ceilings, "attention": check_attention}
