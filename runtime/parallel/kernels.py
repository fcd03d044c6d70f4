"""Attention kernels by name. A ring needs the log-sum-exp beside the output; not every kernel returns it.

Tensor legend: B batch, h heads on this rank, U query tokens, V key tokens, D channels of a head.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

from runtime.errors import BadRequestError, named
from runtime.files.extensions import Registry, source_of

Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]
"""Query, key and value `[B, h, tokens, D]` → output like the query, and log-sum-exp `[B, h, U]` if known."""

_K = TypeVar("_K", bound=Kernel)

AUTO, USP = "auto", "xfuser"
_XFUSER_KERNEL = "xfuser:"

GOOD_CUDNN = 91501  # 9.15.1; older ones are wrong for numbers of tokens that 128 does not divide
_FASTEST = {(9, 0): "cudnn", (10, 0): "cudnn"}
"""Compute capability → kernel of torch that is the fastest on it in half precision; `flash` on others."""


class Card(NamedTuple):
    """A GPU as kernels see it: its compute capability, and the version of its cuDNN (0 without one)."""

    capability: tuple[int, int]
    cudnn: int


@dataclass(frozen=True, slots=True)
class NamedKernel:
    """A kernel, with the devices and dtypes that it supports.

    Attributes:
        devices: types of device.
        rings: whether it returns its log-sum-exp.
        source: identity of its code; None for Lockstep's own.
    """

    kernel: Kernel
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    rings: bool = True
    source: str | None = None


def sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, None]:
    """torch's own choice among its kernels, without the log-sum-exp."""
    return F.scaled_dot_product_attention(query, key, value), None


def flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """torch's flash attention."""
    if query.device.type == "cpu":
        query, key, value = (x.contiguous() for x in (query, key, value))
        output, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)
    else:
        output, log_sum, *_ = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)
    return output, log_sum


def efficient(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """torch's memory-efficient attention."""
    output, log_sum, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, None, compute_log_sumexp=True
    )
    return output, log_sum[..., : query.shape[2]]  # it rounds its rows up to a multiple of 32


def cudnn(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cuDNN's attention."""
    output, log_sum, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, compute_log_sumexp=True
    )
    return output, log_sum.reshape(query.shape[:3])


def math_(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention by its definition, in float32 with the whole matrix in memory: a reference for the others."""
    scores_BhUV = query.float() @ key.float().transpose(-1, -2) / math.sqrt(query.shape[-1])
    log_sum = scores_BhUV.logsumexp(-1)
    output = (scores_BhUV - log_sum.unsqueeze(-1)).exp() @ value.float()
    return output.to(query.dtype), log_sum


_HALVES = (torch.float16, torch.bfloat16)
_ALL = (*_HALVES, torch.float32)
_CHOICES = {
    SDPBackend.MATH: "math",
    SDPBackend.FLASH_ATTENTION: "flash",
    SDPBackend.EFFICIENT_ATTENTION: "efficient",
    SDPBackend.CUDNN_ATTENTION: "cudnn",
    SDPBackend.OVERRIDEABLE: "overrideable",
}
"""Kernels among which torch chooses → their names here; the last one is of a device that is no GPU."""
KERNELS: Registry[NamedKernel] = Registry(
    "kernel",
    {
        "sdpa": NamedKernel(sdpa, ("cpu", "cuda"), _ALL, rings=False),
        "flash": NamedKernel(flash, ("cpu", "cuda"), _ALL),
        "efficient": NamedKernel(efficient, ("cuda",), _ALL),
        "cudnn": NamedKernel(cudnn, ("cuda",), _HALVES),
        "math": NamedKernel(math_, ("cpu", "cuda"), _ALL),
    },
)


def add_kernel(
    name: str, *, devices: Sequence[str] = ("cpu", "cuda"), dtypes: Sequence[torch.dtype] = _ALL
) -> Callable[[_K], _K]:
    """Add a kernel to those that `attention` of a config may name; returns a decorator.

    Args:
        name: name of the kernel, without a colon.
        devices: types of device that it supports.
        dtypes: dtypes that it supports.

    Raises:
        ValueError: the name is taken.
    """
    if name in (AUTO, USP) or ":" in name:
        raise ValueError(f"the kernel's name {name!r} is taken; give it another, without a colon")

    def add(kernel: _K) -> _K:
        KERNELS.add(name, NamedKernel(kernel, tuple(devices), tuple(dtypes), source=source_of(kernel)))
        return kernel

    return add


def added_source(name: str) -> str | None:
    """Identity of the code of an added kernel; None for Lockstep's own, xfuser's and unknown ones.

    Raises:
        BadRequestError: a module of an installed package, which may add it, cannot be imported.
    """
    found = None if name in (AUTO, USP) or ":" in name else KERNELS.find(name)
    return None if found is None else found.source


def resolve(name: str, device: torch.device, dtype: torch.dtype, *, ring: int, fastest: bool = False) -> str:
    """Resolve the name of the kernel that will run; only `auto` is replaced by another.

    Args:
        name: `auto`, a kernel of torch (`sdpa`, `flash`, `efficient`, `cudnn`, `math`) or an added one,
            `xfuser` for its USP, or `xfuser:KERNEL` for one of its kernels within Lockstep's own sequence
            parallelism.
        device, dtype: device and dtype of query, key and value.
        ring: ring degree; above 1 the kernel must return its log-sum-exp.
        fastest: whether `auto` is the fastest kernel without a ring, too; see `choose`.

    Raises:
        BadRequestError: there is no such kernel, or it failed on a small tensor on this machine.
    """
    card = card_of(device)
    if name == AUTO:
        return choose(device, dtype, ring, card, fastest=fastest)
    if name == USP or name.startswith(_XFUSER_KERNEL):
        _import_xfuser(device)
        if name == USP:
            from runtime.parallel.usp import choose_backend

            choose_backend(device, dtype)
            return name
    else:
        _check_known(name, device, dtype, ring=ring)
        refuse_old_cudnn(name, card)
    reason = None if device.type == "cuda" and card is None else why_not(name, device, dtype, ring=ring)
    if reason is not None:
        raise BadRequestError(f"attention: {name!r} given; {reason}")
    return name


def choose(
    device: torch.device, dtype: torch.dtype, ring: int, card: Card | None, *, fastest: bool = False
) -> str:
    """Choose the kernel for `auto`: torch's choice, or the fastest that returns a log-sum-exp.

    Args:
        ring: ring degree; above 1 a log-sum-exp is needed.
        card: the GPU; None for another device, and for a GPU of which nothing is known.
        fastest: whether to choose the fastest without a ring, too; where none is known to be, torch chooses.
    """
    known = _FASTEST.get(card.capability) if card is not None and dtype in _HALVES else None
    if known == "cudnn" and card is not None and card.cudnn < GOOD_CUDNN:
        known = None
    if ring == 1:
        return known if fastest and known is not None else "sdpa"
    if _needs_efficient(device, dtype):
        return "efficient"
    return known or "flash"


def chosen_by_torch(name: str, device: torch.device, dtype: torch.dtype, channels: int) -> str:
    """Name of the kernel that runs under a resolved name: `sdpa` is torch's choice, others are themselves.

    Args:
        device, dtype, channels: of query, key and value; torch chooses by them.
    """
    if name != "sdpa":
        return name
    few = torch.empty(1, 1, 128, channels, dtype=dtype, device=device)
    return _CHOICES[SDPBackend(torch._fused_sdp_choice(few, few, few))]


def card_of(device: torch.device) -> Card | None:
    """Compute capability and cuDNN version of this machine's GPU; None if there is none."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    cudnn: int | None = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return Card(torch.cuda.get_device_capability(device), cudnn or 0)


def refuse_old_cudnn(name: str, card: Card | None) -> None:
    """Refuse cuDNN's attention if this version computes it wrongly.

    Raises:
        BadRequestError: this cuDNN is too old, or there is no cuDNN.
    """
    if name == "cudnn" and card is not None and card.cudnn < GOOD_CUDNN:
        raise BadRequestError(
            f"attention: 'cudnn' given; cuDNN {card.cudnn} computes attention wrongly for some numbers of "
            f"tokens, 9.15.1 ({GOOD_CUDNN}) is needed; use flash, or a newer torch"
        )


@functools.cache
def why_not(name: str, device: torch.device, dtype: torch.dtype, *, ring: int) -> str | None:
    """Reason why a kernel does not run on this device, found by running it once; None if it does."""
    few = torch.zeros(1, 1, 32, 64, dtype=dtype, device=device)
    try:
        output, log_sum = find_kernel(name)(few, few, few)
    except BadRequestError:
        raise
    except Exception as error:  # missing kernels raise anything
        return f"it does not run on {device} with {dtype} ({named(error)})"
    if output.shape != few.shape:
        return f"it returns {list(output.shape)} for {list(few.shape)}"
    if ring > 1 and log_sum is None:
        return "it does not return its log-sum-exp, which ring > 1 needs"
    return None


def _check_known(name: str, device: torch.device, dtype: torch.dtype, *, ring: int) -> None:
    found = KERNELS.find(name)
    if found is None:
        known = ", ".join((AUTO, *KERNELS, USP, f"{_XFUSER_KERNEL}KERNEL"))
        raise BadRequestError(f"attention: {name!r} given; it must be one of {known}")
    if device.type not in found.devices:
        raise BadRequestError(f"attention: {name!r} given; it runs on {' or '.join(found.devices)} only")
    if dtype not in found.dtypes or (name == "flash" and _needs_efficient(device, dtype)):
        raise BadRequestError(f"attention: {name!r} given; it does not take {dtype} on {device.type}")
    if ring > 1 and not found.rings:
        raise BadRequestError(
            f"attention: {name!r} given; it does not return its log-sum-exp, which ring > 1 needs"
        )


def find_kernel(name: str) -> Kernel:
    """Find the kernel of a resolved name (not `xfuser`, whose USP is more than a kernel)."""
    if name.startswith(_XFUSER_KERNEL):  # the same object each time, so that its users compare equal
        return _xfuser_kernel(name.removeprefix(_XFUSER_KERNEL))
    return KERNELS[name].kernel


def _needs_efficient(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether flash attention does not support the dtype: on CUDA it takes half precision only."""
    return device.type == "cuda" and dtype not in _HALVES


def _import_xfuser(device: torch.device) -> None:
    if device.type != "cuda":
        raise BadRequestError(f"attention: xfuser needs CUDA, this rank is on {device.type}")
    try:
        importlib.import_module("xfuser")
    except Exception as error:  # CUDA packages raise anything on machines that they do not support
        raise BadRequestError(
            f"attention: xfuser cannot be imported ({named(error)}); install Lockstep with its extra: "
            "pip install '.[gpu]'"
        ) from None


@functools.cache
def _xfuser_kernel(name: str) -> Kernel:
    """Make a kernel of xfuser's, such as FLASH_3 or SAGE, which tests without a GPU cannot run."""
    from xfuser.core.distributed.attention_backend import ATTENTION_FUNCTION_REGISTRY, AttentionBackendType

    if name.upper() not in AttentionBackendType.__members__:
        known = ", ".join(kind.name for kind in ATTENTION_FUNCTION_REGISTRY)
        raise BadRequestError(f"attention: xfuser has no kernel {name!r}; it has {known}")
    call = ATTENTION_FUNCTION_REGISTRY[AttentionBackendType[name.upper()]]

    def kernel(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        output, log_sum = call(query, key, value, dropout_p=0.0, is_causal=False)
        if log_sum is not None and log_sum.ndim == 4 and log_sum.shape[-1] == 1:
            log_sum = log_sum.squeeze(-1)
        if log_sum is None or log_sum.ndim != 3 or log_sum.shape[-1] < query.shape[2]:
            return output, None  # SDPA_MATH's second output is the attention matrix
        return output, log_sum[..., : query.shape[2]]

    return kernel
