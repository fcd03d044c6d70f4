"""Weights of a component in diffusers layout, each described by the stored tensor that it is made from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from runtime.models.layouts.stored import Stored, TensorReader

if TYPE_CHECKING:  # it takes seconds
    import torch

FLOATS = ("float64", "float32", "float16", "bfloat16")
EIGHT_BITS = ("float8_e4m3fn", "float8_e5m2")
_UNPACKED = "bfloat16"  # what weights of 8 bits become, which loses nothing that they hold


class Weight(NamedTuple):
    """A weight, and how it is made.

    Attributes:
        stored: the tensor that it is made from.
        shape: shape of the weight.
        rows: first row and the one after the last of the tensor that it is made from; None for all rows.
        scale: tensor that it is multiplied by, as weights of 8 bits have: one number, or one for each row.
    """

    stored: Stored
    shape: tuple[int, ...]
    rows: tuple[int, int] | None = None
    scale: Stored | None = None

    @property
    def dtype(self) -> str:
        """Dtype of the weight: that of the stored tensor, or bfloat16 for one of 8 bits."""
        return _UNPACKED if self.stored.dtype in EIGHT_BITS else self.stored.dtype

    def make(self, reader: TensorReader) -> torch.Tensor:
        """Make the weight; it may be a view of the mapped file."""
        tensor = reader.read(self.stored)
        if self.rows is not None:
            tensor = tensor[slice(*self.rows)]
        if self.stored.dtype in EIGHT_BITS:
            tensor = self._unpacked(tensor, reader)
        return tensor.reshape(self.shape)

    def _unpacked(self, tensor: torch.Tensor, reader: TensorReader) -> torch.Tensor:
        """Multiply in float32 and round once: the same bits on every machine."""
        import torch

        wide = tensor.to(torch.float32)
        if self.scale is not None:
            scale = reader.read(self.scale).to(torch.float32).flatten()
            if self.rows is not None and scale.numel() > 1:
                scale = scale[slice(*self.rows)]
            wide *= scale.view(-1, *[1] * (wide.ndim - 1)) if scale.numel() > 1 else scale
        return wide.to(getattr(torch, _UNPACKED))


@dataclass(frozen=True, slots=True)
class Component:
    """A component of a model, such as its transformer, whose weights are made from files in another layout.

    Attributes:
        name: name of its folder in diffusers layout.
        settings: content of its `config.json`.
        weights: name of each weight in diffusers layout → how it is made.
    """

    name: str
    settings: Mapping[str, object]
    weights: Mapping[str, Weight]


class Shapes:
    """Shapes of a component's weights, from which its settings are inferred.

    Args:
        component: what it is, for messages.
        weights: its weights.
    """

    def __init__(self, component: str, weights: Mapping[str, Weight]):
        self._component = component
        self._shapes = {name: weight.shape for name, weight in weights.items()}

    def of(self, name: str, axes: int) -> tuple[int, ...]:
        """Shape of a weight that must be there, of so many axes and not empty.

        Raises:
            ValueError: it is not.
        """
        shape = self._shapes.get(name)
        if shape is None:
            raise ValueError(f"its {self._component} lacks {name}")
        if len(shape) != axes or 0 in shape:
            raise ValueError(
                f"its {self._component} has {name} of shape {list(shape)}, where {axes} axes are needed"
            )
        return shape

    def count(self, stack: str) -> int:
        """Number of modules in a stack, such as `blocks`.

        Raises:
            ValueError: there is none, or they are not numbered from 0 on.
        """
        first = f"{stack}."
        numbers = {name.removeprefix(first).split(".")[0] for name in self._shapes if name.startswith(first)}
        if not numbers or numbers != {str(number) for number in range(len(numbers))}:
            raise ValueError(f"its {self._component} has no {stack} that are numbered from 0 on")
        return len(numbers)

    def __contains__(self, name: object) -> bool:
        return name in self._shapes


def check_names(component: str, names: Iterable[str], expected: Iterable[str]) -> None:
    """Refuse a component that lacks weights, or has others.

    Args:
        component: what it is, for the message.
        names, expected: names of its weights, and what they should be.

    Raises:
        ValueError: they differ.
    """
    found, wanted = set(names), set(expected)
    for problem, some in (("lacks", wanted - found), ("has", found - wanted)):
        if some:
            more = "" if problem == "lacks" else " that do not belong to it"
            raise ValueError(f"its {component} {problem} {len(some)} weights{more}, the first is {min(some)}")


def whole(stored: Stored, scale: Stored | None = None) -> Weight:
    """Make a weight of a whole tensor."""
    return Weight(stored, stored.shape, None, scale)


def made(
    weights: Mapping[str, Weight], names: Iterable[str] | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Make weights one at a time.

    Args:
        weights: name → how it is made.
        names: the names to make, in this order; None for all.

    Raises:
        OSError, ValueError: a file is damaged, or has changed.
    """
    with TensorReader() as reader:
        for name in weights if names is None else names:
            yield name, weights[name].make(reader)
