"""Quantisation of linear layers: 8-bit weights with one scale per output, and for fp8 8-bit activations, too.

A layer is quantised on the device, from weights that are complete and loaded. Its parameters are ordinary
tensors, so it is sharded, swapped and compiled like any other.

Tensor legend: M rows of activations (tokens), K input features, N output features.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import nn

from runtime.errors import BadRequestError, named
from runtime.request.performance import Quantization

SCALES = "weight_scale"  # name of the scales, which stay in float32
_FP8 = torch.float8_e4m3fn
_LARGEST = {_FP8: 448.0, torch.int8: 127.0}
_LEAST_SCALE = 2.0**-120  # rows of zeros have a scale, too
_MULTIPLE = 16  # of features: what `torch._scaled_mm` takes

Scaled: TypeAlias = tuple[torch.Tensor, torch.Tensor]
"""Values in 8 bits `[rows, K]`, and a float32 scale for each row `[rows, 1]`."""


def quantize_rows(x_MK: torch.Tensor, dtype: torch.dtype) -> Scaled:
    """Quantise each row so that its largest magnitude becomes the largest number of `dtype`.

    The error of a value is at most 1/16 of itself, or 2⁻¹⁰ scales, in fp8, and half a scale in int8. A row
    with NaN or infinity becomes NaN in fp8.

    Args:
        x_MK: values of any floating-point dtype; finite for int8.
        dtype: `float8_e4m3fn` or `int8`.
    """
    largest = _LARGEST[dtype]
    most_M1 = torch.linalg.vector_norm(x_MK, torch.inf, dim=-1, keepdim=True)
    scale_M1 = (most_M1.float() / largest).clamp(min=_LEAST_SCALE)
    scaled_MK = x_MK / scale_M1
    if dtype is torch.int8:
        scaled_MK.round_()
    return scaled_MK.clamp_(-largest, largest).to(dtype), scale_M1


def scaled_product(rows: Scaled, weight: Scaled, bias_N: torch.Tensor | None) -> torch.Tensor:
    """Multiply fp8 rows with fp8 weights on tensor cores: `[M, N]` in bfloat16, summed in float32."""
    (values_MK, scale_M1), (weight_NK, scale_N1) = rows, weight
    output_MN: torch.Tensor = torch._scaled_mm(
        values_MK,
        weight_NK.t(),
        scale_a=scale_M1,
        scale_b=scale_N1.t(),
        bias=None if bias_N is None else bias_N.to(torch.bfloat16),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return output_MN


def exact_product(rows: Scaled, weight: Scaled, bias_N: torch.Tensor | None) -> torch.Tensor:
    """Compute what `scaled_product` does in float32, for devices without such tensor cores."""
    (values_MK, scale_M1), (weight_NK, scale_N1) = rows, weight
    output_MN = F.linear(values_MK.float(), weight_NK.float()) * scale_M1 * scale_N1.t()
    return output_MN if bias_N is None else output_MN + bias_N.float()


class QuantizedLinear(nn.Module):
    """A linear layer with a weight in 8 bits `[N, K]`, a float32 scale per output `[N, 1]`, and a bias.

    Args:
        linear: layer that it replaces, with finite weights.
    """

    stored: torch.dtype

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight_NK, scale_N1 = quantize_rows(linear.weight.detach(), self.stored)
        self.weight = nn.Parameter(weight_NK, requires_grad=False)
        self.weight_scale = nn.Parameter(scale_N1, requires_grad=False)
        self.bias = linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features


class Fp8Linear(QuantizedLinear):
    """Linear layer in fp8 (e4m3): weights scaled by output, activations by token at each call."""

    stored = _FP8

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = quantize_rows(x.reshape(-1, self.in_features), _FP8)
        product = scaled_product if x.device.type == "cuda" else exact_product
        output_MN = product(rows, (self.weight, self.weight_scale), self.bias)
        return output_MN.to(x.dtype).view(*x.shape[:-1], self.out_features)


class Int8Linear(QuantizedLinear):
    """Linear layer with int8 weights, which are dequantised at each call; activations keep their dtype."""

    stored = torch.int8

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight_NK = (self.weight.float() * self.weight_scale).to(x.dtype)
        return F.linear(x, weight_NK, self.bias)


_LAYERS: dict[Quantization, type[QuantizedLinear]] = {"fp8": Fp8Linear, "int8": Int8Linear}


def quantize_linears(module: nn.Module, quantization: Quantization) -> None:
    """Replace every linear layer within a module whose features are multiples of 16.

    Args:
        module: the module, with its weights on the device on which it will run.
        quantization: format; `none` changes nothing.

    Raises:
        BadRequestError: there is no such layer.
    """
    if quantization == "none":
        return
    layers = list(_layers(module))
    if not layers:
        raise BadRequestError(
            f"quantization: {quantization!r} given; the model has no linear layers of multiples of "
            f"{_MULTIPLE} features"
        )
    for parent, name, child in layers:
        parent._modules[name] = _LAYERS[quantization](child)


def _layers(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Yield each linear layer that can be quantised, with the module that it is in and its name there."""
    for parent in module.modules():
        for name, child in parent.named_children():
            if (
                type(child) is nn.Linear
                and child.in_features % _MULTIPLE == child.out_features % _MULTIPLE == 0
            ):
                yield parent, name, child


def check_quantization(quantization: Quantization, device: torch.device) -> None:
    """Refuse a format that a device does not multiply in, by trying a small layer.

    Raises:
        BadRequestError: it failed; the message says how.
    """
    reason = None if quantization == "none" else why_not(quantization, device)
    if reason is not None:
        raise BadRequestError(f"quantization: {quantization!r} given; {reason}")


@functools.cache
def why_not(quantization: Quantization, device: torch.device) -> str | None:
    """Reason why a format does not run on a device, found by running a small layer once; None if it does."""
    try:
        small = nn.Linear(_MULTIPLE, _MULTIPLE, device=device, dtype=torch.bfloat16)
        with torch.no_grad():
            _LAYERS[quantization](small)(torch.ones(1, _MULTIPLE, device=device, dtype=torch.bfloat16))
    except Exception as error:  # kernels that are missing raise anything
        needs = "; fp8 needs a GPU of compute capability 8.9 or more" if quantization == "fp8" else ""
        return f"it does not run on {device} ({named(error)}){needs}"
    return None
