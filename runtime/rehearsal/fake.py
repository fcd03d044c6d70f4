"""Fake device: fake tensors on a device that does not exist, and modules of such tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from runtime.rehearsal import indexing
from runtime.rehearsal.ledger import Ledger

DEVICE = torch.device("cuda", 0)


class FakeDevice:
    """A device that does not exist: torch propagates shapes, and computes and allocates nothing.

    Attributes:
        ledger: ledger of the work and memory that a real device would need.
    """

    def __init__(self) -> None:
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.ledger = Ledger(DEVICE.type, self._fake)

    @contextmanager
    def running(self) -> Iterator[Ledger]:
        """Run the context on fake tensors, and count its work."""
        with _no_streams(), self._fake, self.ledger, _Accelerator(), torch.no_grad():
            yield self.ledger

    def module(
        self, make: Callable[[], nn.Module], dtype_of: Callable[[str, torch.Tensor], torch.dtype]
    ) -> Any:
        """Make a module whose parameters and buffers are fake tensors on the device and count as weights.

        Args:
            make: builds the module, on the meta device.
            dtype_of: name and tensor → dtype in which the tensor is loaded.
        """
        with torch.device("meta"), _Uninitialised():
            module = make()
        known: dict[int, torch.Tensor] = {}
        with self.running() as ledger, ledger.as_weights():
            for name, owner in module.named_modules():
                for box in (owner._parameters, owner._buffers):
                    for leaf, tensor in box.items():
                        if tensor is None:
                            continue
                        if id(tensor) not in known:
                            dtype = dtype_of(f"{name}.{leaf}".lstrip("."), tensor)
                            known[id(tensor)] = torch.empty(tensor.shape, dtype=dtype, device=DEVICE)
                        box[leaf] = known[id(tensor)]
                        if box is owner._parameters:
                            box[leaf]._is_param = True  # as `nn.Parameter` does, after it made another tensor
        return module.eval()


def diffusers_dtype(kind: Any, dtype: torch.dtype) -> Callable[[str, torch.Tensor], torch.dtype]:
    """Make `dtype_of` for `FakeDevice.module` as diffusers loads a model class: some stay in float32."""
    kept = kind._keep_in_fp32_modules or []

    def dtype_of(name: str, tensor: torch.Tensor) -> torch.dtype:
        if not isinstance(tensor, nn.Parameter) or not tensor.is_floating_point():
            return tensor.dtype
        return torch.float32 if any(part in name.split(".") for part in kept) else dtype

    return dtype_of


def diffusers_module(fake: FakeDevice, kind: Any, path: Path, dtype: torch.dtype) -> Any:
    """Make a fake diffusers model from its settings in `path`."""
    return fake.module(lambda: kind.from_config(kind.load_config(path)), diffusers_dtype(kind, dtype))


class _Uninitialised(TorchFunctionMode):
    """Leaves out the initialisation of weights by `torch.nn.init`: on the meta device it does nothing."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


class _Accelerator(TorchFunctionMode):
    """Functions that a CPU build of torch lacks for fake tensors on a GPU.

    It cannot index tensors of other devices or pin memory, and its attention materialises the whole matrix.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.record_stream:
            return None
        instead = _INSTEAD.get(func)
        if instead is not None and (args or (kwargs["query"],))[0].device.type == DEVICE.type:
            return instead(*args, **kwargs)
        return func(*args, **kwargs)


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Run flash attention, or for float32 and masks memory-efficient attention."""
    if attn_mask is None and query.element_size() == 2:
        output, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, scale=scale
        )
    else:
        output, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, False, dropout_p, is_causal, scale=scale
        )
    assert isinstance(output, torch.Tensor)
    return output


def _contiguous(
    tensor: torch.Tensor, *, memory_format: torch.memory_format = torch.contiguous_format
) -> torch.Tensor:
    is_so = tensor.is_contiguous(memory_format=memory_format)
    return tensor if is_so else tensor.clone(memory_format=memory_format)


_INSTEAD: dict[Any, Callable[..., Any]] = {
    F.scaled_dot_product_attention: _attention,
    torch.Tensor.__getitem__: indexing.get,
    torch.Tensor.__setitem__: indexing.put,
    torch.Tensor.contiguous: _contiguous,
    torch.Tensor.copy_: torch.ops.aten.copy_.default,
}
"""Function that needs the device → replacement that does not."""


class _Stream:
    """A stream or an event that does nothing."""

    def wait_stream(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def record(self, stream: Any = None) -> None: ...


_STREAMS = SimpleNamespace(
    current_stream=lambda *_: _Stream(),
    Stream=_Stream,
    Event=_Stream,
    stream=lambda _: contextlib.nullcontext(),
)


@contextmanager
def _no_streams() -> Iterator[None]:
    """Replace accelerators' streams, which a CPU build lacks, by ones that do nothing."""
    with (
        patch.object(torch, "get_device_module", lambda *_: _STREAMS),
        patch.object(torch.accelerator, "device_index", lambda _: contextlib.nullcontext()),
        patch.object(torch.accelerator, "synchronize", lambda *_: None),
    ):
        yield
