"""Outputs: what a transformer returns, as one tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree


@dataclass(frozen=True, slots=True)
class Layout:
    """How an output is put together: from its tensors, laid end to end, and whatever else it holds.

    Attributes:
        tree: nesting of lists, tuples and diffusers' outputs.
        leaves: what is in them; the shape in place of a tensor.
    """

    tree: Any
    leaves: tuple[Any, ...]

    def output(self, packed: torch.Tensor) -> Any:
        """Put an output together; its tensors are views of `packed`."""
        shapes = [leaf for leaf in self.leaves if isinstance(leaf, torch.Size)]
        sizes = [shape.numel() for shape in shapes]
        pieces = [packed] if len(shapes) == 1 else torch.split(packed, sizes)
        parts = (piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True))
        leaves = [next(parts) if isinstance(leaf, torch.Size) else leaf for leaf in self.leaves]
        return pytree.tree_unflatten(leaves, self.tree)


def pack(output: Any) -> tuple[torch.Tensor, Layout]:
    """Take an output apart.

    Raises:
        TypeError: it has no tensors, or tensors of several dtypes or devices.
    """
    leaves, tree = pytree.tree_flatten(output)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    kinds = {(tensor.dtype, tensor.device) for tensor in tensors}
    if len(kinds) != 1:
        raise TypeError(
            f"stream velocity: the transformer returns {type(output).__name__} with tensors of {len(kinds)} "
            f"kinds (dtype and device); they must be of one"
        )
    packed = tensors[0] if len(tensors) == 1 else torch.cat([tensor.reshape(-1) for tensor in tensors])
    return packed, Layout(tree, tuple(x.shape if isinstance(x, torch.Tensor) else x for x in leaves))
