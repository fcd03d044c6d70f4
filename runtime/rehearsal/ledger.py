"""What operators on made-up tensors would take: operations, bytes read and written, launches, and memory."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_BLOCK = 512  # bytes; CUDA's caching allocator rounds up to them
_FREE = ("prim.", "aten.empty", "aten.new_empty", "aten._unsafe_view", "aten.lift", "aten._local_scalar")
KINDS = ("attention", "linear", "convolution", "other")


class Operator(NamedTuple):
    """One launch, as far as its cost goes.

    Attributes:
        kind: `attention`, `linear` (products of matrices), `convolution`, or `other`, whose operations are
            not counted.
        itemsize: bytes of the numbers that it works with.
        flops: floating-point operations, a multiplication and an addition being two.
        moved: bytes of all its tensors.
    """

    kind: str
    itemsize: int
    flops: int
    moved: int


@dataclass(slots=True)
class Work:
    """Operators, and how often each is launched."""

    operators: Counter[Operator] = field(default_factory=Counter)

    @property
    def launches(self) -> int:
        return self.operators.total()

    @property
    def flops(self) -> dict[str, int]:
        """Operations by kind, where there are any."""
        found = dict.fromkeys(KINDS, 0)
        for operator, times in self.operators.items():
            found[operator.kind] += times * operator.flops
        return {kind: count for kind, count in found.items() if count}

    @property
    def moved(self) -> int:
        """Bytes that operators read and write, if none of it stays in a cache."""
        return sum(times * operator.moved for operator, times in self.operators.items())

    def copy(self) -> Work:
        """Another one, which does not change with this one."""
        return Work(Counter(self.operators))

    def minus(self, other: Work) -> Work:
        """What came after `other`, which was a part of this."""
        return Work(self.operators - other.operators)

    def plus(self, other: Work, times: int = 1) -> Work:
        """Both together, the other one so often."""
        joined = Counter(self.operators)
        for operator, count in other.operators.items():
            joined[operator] += times * count
        return Work(joined)


@dataclass(frozen=True, slots=True)
class Memory:
    """The most that a device held at one time, in bytes.

    Attributes:
        peak: of everything.
        weights, history: of it.
    """

    peak: int
    weights: int
    history: int = 0

    @property
    def activations(self) -> int:
        """What is neither weights nor history."""
        return self.peak - self.weights - self.history


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what runs in it on tensors of one type of device.

    Attributes:
        now, peak: bytes held, and the most since `start`.
        weights: bytes of what is held that are weights.
        work: since `start`.
    """

    def __init__(self, device: str):
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device
        self._alive: dict[int, tuple[Any, int, bool]] = {}
        self._are_weights = False
        self.now, self.weights = 0, 0
        self.peak, self._weights_at_peak = 0, 0
        self.work = Work()

    def start(self) -> None:
        """Begin to measure."""
        self.peak, self._weights_at_peak, self.work = self.now, self.weights, Work()

    def finish(self, history: int = 0) -> tuple[Work, Memory]:
        """What was done and held since `start`; `history` is what of it is kept for forecasts."""
        work, self.work = self.work, Work()
        return work, Memory(self.peak, self._weights_at_peak, history)

    def add(self, work: Work, rise: int = 0) -> None:
        """Count what is like something that was done already; meanwhile so many bytes more were held."""
        for operator, times in work.operators.items():
            self.work.operators[operator] += times
        self._reach(self.now + rise)

    @contextmanager
    def rise(self) -> Iterator[list[int]]:
        """The one number of the list becomes how many bytes more than before were held within the block."""
        found, peak, weights, self.peak = [0], self.peak, self._weights_at_peak, self.now
        before = self.now
        try:
            yield found
        finally:
            found[0] = self.peak - before
            if peak >= self.peak:
                self.peak, self._weights_at_peak = peak, weights

    @contextmanager
    def of_weights(self) -> Iterator[None]:
        """What is made while the block runs are weights."""
        before, self._are_weights = self._are_weights, True
        try:
            yield
        finally:
            self._are_weights = before

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        outputs = [one for one in _tensors((result,)) if one.device.type == self._device]
        for output in outputs:
            self._take(output)
        inputs = _tensors((*args, *kwargs.values()))
        if _launches(func) and (outputs or any(one.device.type == self._device for one in inputs)):
            self.work.operators[_operator(func, args, kwargs, result, inputs, outputs)] += 1
        return result

    def _take(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        size, weights = -(-storage.nbytes() // _BLOCK) * _BLOCK, self._are_weights
        self._alive[key] = weakref.ref(storage, lambda _: self._drop(key)), size, weights
        self.now += size
        self.weights += size if weights else 0
        self._reach(self.now)

    def _reach(self, held: int) -> None:
        if held > self.peak:
            self.peak, self._weights_at_peak = held, self.weights

    def _drop(self, key: int) -> None:
        _, size, weights = self._alive.pop(key)
        self.now -= size
        self.weights -= size if weights else 0


_LAUNCHES: dict[Any, bool] = {}


def _launches(func: Any) -> bool:
    """Whether an operator computes or copies anything: neither a view nor fresh memory."""
    if func not in _LAUNCHES:
        returns = func._schema.returns
        view = any(one.alias_info is not None and not one.alias_info.is_write for one in returns)
        _LAUNCHES[func] = not (view or str(func).startswith(_FREE))
    return _LAUNCHES[func]


def _tensors(values: Sequence[Any]) -> list[torch.Tensor]:
    """All tensors in arguments or results, those in lists included."""
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found


def _operator(
    func: Any,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    result: Any,
    inputs: list[torch.Tensor],
    outputs: list[torch.Tensor],
) -> Operator:
    packet = func._overloadpacket
    moved = sum(_bytes(one) for one in (*inputs, *outputs))
    itemsize = max((one.element_size() for one in inputs if one.is_floating_point()), default=4)
    if packet not in flop_registry:
        return Operator("other", itemsize, 0, moved)
    name = str(packet)
    kind = "attention" if "attention" in name else "convolution" if "conv" in name else "linear"
    return Operator(kind, itemsize, int(flop_registry[packet](*args, **kwargs, out_val=result)), moved)


def _bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's own elements; expanded ones are there once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
