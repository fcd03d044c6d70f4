"""Attention kernels by name. A ring needs the log-sum-exp beside the output; not every kernel has it.

Tensor legend: B batch, h heads on this rank, U query tokens, V key tokens, D channels of a head.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from runtime.errors import BadRequestError

Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]
"""Query, key and value `[B, h, tokens, D]` → output like the query, and log-sum-exp `[B, h, U]` if known."""

AUTO, USP = "auto", "xfuser"
_XFUSER_KERNEL = "xfuser:"


@dataclass(frozen=True, slots=True)
class _Torch:
    """A kernel of torch and where it runs."""

    kernel: Kernel
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    rings: bool = True


def sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, None]:
    """torch's own choice among its kernels, which does not tell the log-sum-exp."""
    return F.scaled_dot_product_attention(query, key, value), None


def flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """torch's flash attention."""
    query, key, value = (x.contiguous() for x in (query, key, value))
    if query.device.type == "cpu":
        output, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)
    else:
        output, log_sum, *_ = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)
    return output, log_sum


def efficient(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """torch's memory-efficient attention."""
    output, log_sum, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        query.contiguous(), key.contiguous(), value.contiguous(), None, compute_log_sumexp=True
    )
    return output, log_sum[..., : query.shape[2]]  # it rounds its rows up to a multiple of 32


def cudnn(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cuDNN's attention."""
    output, log_sum, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        query.contiguous(), key.contiguous(), value.contiguous(), None, compute_log_sumexp=True
    )
    return output, log_sum.reshape(query.shape[:3])


def math_(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, in float32 and with the whole matrix in memory: for checking the others."""
    scores_BhUV = query.float() @ key.float().transpose(-1, -2) / math.sqrt(query.shape[-1])
    log_sum = scores_BhUV.logsumexp(-1)
    output = (scores_BhUV - log_sum.unsqueeze(-1)).exp() @ value.float()
    return output.to(query.dtype), log_sum


_HALVES = (torch.float16, torch.bfloat16)
_ALL = (*_HALVES, torch.float32)
_KERNELS = {
    "sdpa": _Torch(sdpa, ("cpu", "cuda"), _ALL, rings=False),
    "flash": _Torch(flash, ("cpu", "cuda"), _ALL),
    "efficient": _Torch(efficient, ("cuda",), _ALL),
    "cudnn": _Torch(cudnn, ("cuda",), _HALVES),
    "math": _Torch(math_, ("cpu", "cuda"), _ALL),
}


def resolve(name: str, device: torch.device, dtype: torch.dtype, *, ring: int) -> str:
    """The name of the kernel that will run; only `auto` is ever turned into another.

    Args:
        name: `auto`, a kernel of torch (`sdpa`, `flash`, `efficient`, `cudnn`, `math`), `xfuser` for its USP,
            or `xfuser:KERNEL` for one of its kernels within Lockstep's own sequence parallelism.
        ring: ring degree; above 1 the kernel must tell its log-sum-exp.

    Raises:
        BadRequestError: there is no such kernel, or it does not run here.
    """
    if name == AUTO:
        return "sdpa" if ring == 1 else ("efficient" if _needs_efficient(device, dtype) else "flash")
    if name == USP or name.startswith(_XFUSER_KERNEL):
        _import_xfuser(device)
        return name
    if name not in _KERNELS:
        known = ", ".join((AUTO, *_KERNELS, USP, f"{_XFUSER_KERNEL}KERNEL"))
        raise BadRequestError(f"attention: {name!r} given; it must be one of {known}")
    found = _KERNELS[name]
    if device.type not in found.devices:
        raise BadRequestError(f"attention: {name!r} given; it runs on {' or '.join(found.devices)} only")
    if dtype not in found.dtypes or (name == "flash" and _needs_efficient(device, dtype)):
        raise BadRequestError(f"attention: {name!r} given; it does not take {dtype} on {device.type}")
    if ring > 1 and not found.rings:
        raise BadRequestError(
            f"attention: {name!r} given; it does not tell its log-sum-exp, as ring > 1 needs"
        )
    return name


def find_kernel(name: str) -> Kernel:
    """The kernel of a resolved name (not `xfuser`, whose USP is more than a kernel)."""
    if name.startswith(_XFUSER_KERNEL):
        return _xfuser_kernel(name.removeprefix(_XFUSER_KERNEL))
    return _KERNELS[name].kernel


def _needs_efficient(device: torch.device, dtype: torch.dtype) -> bool:
    """CUDA's flash attention takes half precision only."""
    return device.type == "cuda" and dtype not in _HALVES


def _import_xfuser(device: torch.device) -> None:
    if device.type != "cuda":
        raise BadRequestError(f"attention: xfuser needs CUDA, this rank is on {device.type}")
    try:
        importlib.import_module("xfuser")
    except Exception as error:  # whatever a CUDA package raises on a machine that it does not like
        raise BadRequestError(
            f"attention: xfuser cannot be imported ({type(error).__name__}: {error}); "
            "pip install 'lockstep-video[gpu]'"
        ) from None


def _xfuser_kernel(name: str) -> Kernel:
    """One of xfuser's kernels, such as FLASH_3 or SAGE; untested here, for want of a GPU."""
    from xfuser.core.distributed.attention_backend import ATTENTION_FUNCTION_REGISTRY, AttentionBackendType

    if name.upper() not in AttentionBackendType.__members__:
        known = ", ".join(kind.name for kind in ATTENTION_FUNCTION_REGISTRY)
        raise BadRequestError(f"attention: xfuser has no kernel {name!r}; it has {known}")
    call = ATTENTION_FUNCTION_REGISTRY[AttentionBackendType[name.upper()]]

    def kernel(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        output, log_sum = call(query, key, value, dropout_p=0.0, is_causal=False)
        return output, None if log_sum is None else log_sum[..., : query.shape[2]].reshape(query.shape[:3])

    return kernel
