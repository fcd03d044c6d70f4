"""What an accelerator would be told to do, counted without one: on the meta device."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

_VIEWS = {
    "view",
    "slice",
    "split",
    "select",
    "transpose",
    "permute",
    "unsqueeze",
    "expand",
    "detach",
    "alias",
}
_NOTHING = {*_VIEWS, "empty", "promote_types", "_unsafe_view", "split_with_sizes", "unbind", "t", "new_empty"}


class Launches(TorchDispatchMode):
    """Names of the operators that start a kernel, in order; views and allocations start none."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if name not in _NOTHING:
            self.names.append(name)
        return result

    @property
    def waits(self) -> list[str]:
        """Those that wait for the device: it is asked for a number."""
        return [name for name in self.names if name in ("_local_scalar_dense", "item", "equal")]
