"""Outcomes of operators on fake tensors: they follow from the metadata of arguments, and are found once.

Torch takes several times as long to find them, even those that it knows. What depends on more than metadata
is never known: operators on real tensors, on ones with constants, that return numbers, or that write into an
`out`, for example. Code that is rehearsed may not give a tensor other data (`tensor.data = …`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

if TYPE_CHECKING:
    from runtime.rehearsal.ledger import Operator


class Key(NamedTuple):
    """What an outcome follows from, and the tensors that it is to be made for.

    Attributes:
        parts: the operator and its arguments; in place of a tensor, its type and the number of its metadata.
        tensors: these tensors.
    """

    parts: tuple[Any, ...]
    tensors: list[FakeTensor]


@dataclass(frozen=True, slots=True)
class _Output:
    """A tensor that an operator returns.

    Attributes:
        source: index of the input whose memory it has; None if its memory is its own.
        same: whether it is that input.
        shape, stride, offset, dtype, device: its metadata.
        state: other attributes of a fake tensor.
    """

    source: int | None
    same: bool
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device
    state: dict[str, Any]

    def again(self, inputs: Sequence[FakeTensor], mode: FakeTensorMode) -> torch.Tensor:
        """Make the tensor for other inputs."""
        if self.source is None:
            with torch._C._DisableTorchDispatch():
                memory = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")
        elif self.same:
            return inputs[self.source]
        else:
            storage = inputs[self.source].untyped_storage()
            with torch._C._DisableTorchDispatch():
                memory = torch.empty(0, dtype=self.dtype, device="meta")
                memory.set_(storage, self.offset, self.shape, self.stride)
        made = torch.Tensor._make_subclass(
            FakeTensor, memory, False, dispatch_device=True, device_for_backend_keys=self.device
        )
        torch._C._set_throw_on_mutable_data_ptr(made)
        made.__dict__.update(self.state, fake_mode=mode)
        return made


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an operator returns, and what counts of it.

    Attributes:
        counted: its cost; None if it launches nothing.
        sequence: type of what it returns; None if it is one tensor.
        outputs: the tensors that it returns.
    """

    counted: Operator | None
    sequence: type | None
    outputs: tuple[_Output, ...]

    def again(self, inputs: Sequence[FakeTensor], mode: FakeTensorMode) -> tuple[Any, list[torch.Tensor]]:
        """Return what the operator would, and those of its tensors that have memory of their own."""
        made = [one.again(inputs, mode) for one in self.outputs]
        own = [one for one, output in zip(made, self.outputs, strict=True) if output.source is None]
        return (made[0] if self.sequence is None else self.sequence(made)), own


_SEEN = "_lockstep_seen"  # attribute of a fake tensor: number of its metadata
_MOST = 100_000  # outcomes that are remembered at one time
_PLAIN = {int, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format}
_OUTCOMES: dict[tuple[Any, ...], Outcome] = {}
_NUMBERS: dict[tuple[Any, ...], int] = {}
_FOLLOWING = itertools.count()


def key_of(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Key | None:
    """Find what an operator's outcome follows from; None if it is more than metadata."""
    if _writes_out(func):
        return None
    parts: list[Any] = [func, torch.get_default_dtype()]
    tensors: list[FakeTensor] = []
    if not _describe(args, parts, tensors):
        return None
    if kwargs:
        parts += kwargs
        if not _describe([*kwargs.values()], parts, tensors):
            return None
    return Key(tuple(parts), tensors)


def find(key: Key | None) -> Outcome | None:
    """Return the outcome that follows from a key; None if it is not known."""
    return None if key is None else _OUTCOMES.get(key.parts)


def remember(
    key: Key | None, func: Any, inputs: Sequence[torch.Tensor], result: Any, counted: Operator | None
) -> None:
    """Remember the outcome of an operator if it follows from its key."""
    if torch.Tag.inplace_view in func.tags:
        for one in inputs:
            one.__dict__.pop(_SEEN, None)
    elif key is not None:
        sequence = type(result) if isinstance(result, tuple | list) else None
        outputs = _outputs([result] if sequence is None else result, key.tensors)
        if outputs is not None:
            if len(_OUTCOMES) >= _MOST:
                _OUTCOMES.clear()
                _NUMBERS.clear()  # tensors keep theirs, and others get new ones
            _OUTCOMES[key.parts] = Outcome(counted, sequence, outputs)


@cache
def _writes_out(func: Any) -> bool:
    """Whether an operator may change the size of one of its arguments."""
    return any(argument.is_out for argument in func._schema.arguments)


def _describe(values: Sequence[Any], parts: list[Any], tensors: list[FakeTensor]) -> bool:
    """Append values to the parts of a key; returns whether all of them can be."""
    for value in values:
        kind = type(value)
        if kind is FakeTensor:
            number = None if value.requires_grad else value.__dict__.get(_SEEN) or _number(value)
            if number is None:
                return False
            parts.append((FakeTensor, number))  # which no number among the arguments equals
            tensors.append(value)
        elif kind in _PLAIN:
            parts.append(value)
        elif kind is bool or kind is float:
            parts.append((kind, value))  # True, 1 and 1.0 are equal
        elif kind is list or kind is tuple or kind is torch.Size:
            parts.append((kind, len(value)))
            if not _describe(value, parts, tensors):
                return False
        else:
            return False
    return True


def _number(tensor: FakeTensor) -> int | None:
    """Number of a fake tensor's metadata, the same for all that are alike; None if that is not all it has."""
    if tensor.constant is not None or tensor.layout is not torch.strided or tensor.requires_grad:
        return None
    if tensor.is_conj() or tensor.is_neg():
        return None
    held = tensor.untyped_storage().nbytes()
    alike = tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype, tensor.device, held
    number = _NUMBERS.setdefault(alike, -next(_FOLLOWING) - 1)
    tensor.__dict__[_SEEN] = number
    return number


def _outputs(results: Sequence[Any], inputs: Sequence[FakeTensor]) -> tuple[_Output, ...] | None:
    """Describe what an operator returned; None if it does not follow from its inputs' metadata."""
    held = [one.untyped_storage()._cdata for one in inputs]
    found, own = [], set[int]()
    for one in results:
        if type(one) is not FakeTensor or _number(one) is None:
            return None
        same = next((index for index, other in enumerate(inputs) if other is one), None)
        memory = one.untyped_storage()
        source = held.index(memory._cdata) if memory._cdata in held else None
        if source is None:
            if memory._cdata in own or not _is_all_of(one, memory.nbytes()):
                return None
            own.add(memory._cdata)
        state = {name: value for name, value in one.__dict__.items() if name != "fake_mode"}
        found.append(
            _Output(
                source if same is None else same,
                same is not None,
                tuple(one.shape),
                tuple(one.stride()),
                int(one.storage_offset()),
                one.dtype,
                one.device,
                state,
            )
        )
    return tuple(found)


def _is_all_of(one: FakeTensor, size: int) -> bool:
    """Return whether a tensor takes exactly the memory of this size that it is in."""
    pairs = zip(one.shape, one.stride(), strict=True)
    last = sum((length - 1) * step for length, step in pairs)
    return one.storage_offset() == 0 and size == ((last + 1) * one.element_size() if one.numel() else 0)
