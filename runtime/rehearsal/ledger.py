"""Ledger of operators on fake tensors: operations, bytes read and written, launches, and memory."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from runtime.rehearsal.known import Key, find, key_of, remember

_BLOCK = 512  # bytes; CUDA's caching allocator rounds up to them
_FREE = ("prim.", "aten.empty", "aten.new_empty", "aten._unsafe_view", "aten.lift", "aten._local_scalar")
KINDS = ("attention", "linear", "convolution", "other", "bus")
_DEVICE = torch.ops.prim.device.default
_COPIES = (torch.ops.aten.copy_, torch.ops.aten._to_copy)


class Operator(NamedTuple):
    """Cost of one operator launch.

    Attributes:
        kind: `attention`, `linear` (matrix products), `convolution`; `bus`, a copy between the device and the
            host; or `other`, whose operations are not counted.
        itemsize: bytes per number of its largest input.
        flops: floating-point operations; a multiplication and an addition are two.
        moved: bytes of all its tensors; of a copy between device and host, those of one of them.
    """

    kind: str
    itemsize: int
    flops: int
    moved: int


@dataclass(slots=True)
class Work:
    """Operators and the number of launches of each."""

    operators: Counter[Operator] = field(default_factory=Counter)

    @property
    def launches(self) -> int:
        """Number of all launches."""
        return self.operators.total()

    @property
    def flops(self) -> dict[str, int]:
        """Floating-point operations by kind; kinds without any are left out."""
        found = dict.fromkeys(KINDS, 0)
        for operator, times in self.operators.items():
            found[operator.kind] += times * operator.flops
        return {kind: count for kind, count in found.items() if count}

    @property
    def moved(self) -> int:
        """Bytes that operators read and write if no cache helps."""
        return sum(times * operator.moved for operator, times in self.operators.items())

    @property
    def crossed(self) -> int:
        """Bytes that are copied between the device and the host."""
        return sum(times * one.moved for one, times in self.operators.items() if one.kind == "bus")

    def copy(self) -> Work:
        """Copy this work."""
        return Work(Counter(self.operators))

    def minus(self, other: Work) -> Work:
        """Work that was added after `other`, an earlier copy of this."""
        return Work(self.operators - other.operators)

    def plus(self, other: Work, times: int = 1) -> Work:
        """Sum of this work and `times` times the other."""
        joined = Counter(self.operators)
        for operator, count in other.operators.items():
            joined[operator] += times * count
        return Work(joined)


@dataclass(frozen=True, slots=True)
class Memory:
    """Peak memory of a device, in bytes.

    Attributes:
        peak: the most bytes that were held at one time.
        weights, history: bytes of these that were weights, and history for forecasts.
    """

    peak: int
    weights: int
    history: int = 0

    @property
    def activations(self) -> int:
        """Bytes at the peak that were neither weights nor history."""
        return self.peak - self.weights - self.history


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Dispatch mode that counts operators on tensors of one device, and the memory that these hold.

    Args:
        device: type of the device, such as `cuda`.
        mode: mode of the fake tensors.

    Attributes:
        now, peak: bytes held now, and at most since `start`.
        weights: bytes held now by weights.
        work: operators since `start`.
    """

    def __init__(self, device: str, mode: FakeTensorMode):
        super().__init__()  # type: ignore[no-untyped-call]
        self._device, self._mode = device, mode
        self._alive: dict[int, tuple[Any, int, bool]] = {}
        self._are_weights = False
        self.now, self.weights = 0, 0
        self.peak, self._weights_at_peak = 0, 0
        self.work = Work()

    def start(self) -> None:
        """Begin a measurement."""
        self.peak, self._weights_at_peak, self.work = self.now, self.weights, Work()

    def finish(self, history: int = 0) -> tuple[Work, Memory]:
        """Return work and peak memory since `start`.

        Args:
            history: bytes of it that are history for forecasts.
        """
        work, self.work = self.work, Work()
        return work, Memory(self.peak, self._weights_at_peak, history)

    def add(self, work: Work, rise: int = 0) -> None:
        """Count work that is not run because it equals work that was.

        Args:
            work: the work.
            rise: bytes that it would hold meanwhile, beside those held now.
        """
        for operator, times in work.operators.items():
            self.work.operators[operator] += times
        self._reach(self.now + rise)

    @contextmanager
    def rise(self) -> Iterator[list[int]]:
        """Measure how far memory rises within the context; at its end the list's one number is that rise."""
        found, peak, weights, self.peak = [0], self.peak, self._weights_at_peak, self.now
        before = self.now
        try:
            yield found
        finally:
            found[0] = self.peak - before
            if peak >= self.peak:
                self.peak, self._weights_at_peak = peak, weights

    @contextmanager
    def as_weights(self) -> Iterator[None]:
        """Count tensors that are made within the context as weights."""
        before, self._are_weights = self._are_weights, True
        try:
            yield
        finally:
            self._are_weights = before

    def weigh(self, sizes: Iterable[int]) -> int:
        """Count weights that come to the device without tensors of their own.

        Args:
            sizes: bytes of each.

        Returns:
            Bytes that they hold, for `unweigh`.
        """
        size = sum(map(_held, sizes))
        self.now += size
        self.weights += size
        self._reach(self.now)
        return size

    def unweigh(self, size: int) -> None:
        """Count bytes that `weigh` returned no longer."""
        self.now -= size
        self.weights -= size

    def set_aside(self, tensor: torch.Tensor) -> int:
        """Count memory of a weight no longer, although the tensor stays; returns its bytes."""
        key = tensor.untyped_storage()._cdata
        if key not in self._alive:
            return 0
        reference, size, weights = self._alive[key]
        self._alive[key] = reference, 0, weights
        self.now -= size
        self.weights -= size if weights else 0
        return size

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _DEVICE and type(args[0]) is FakeTensor:
            return args[0].device
        kwargs = kwargs or {}
        key = key_of(func, args, kwargs)
        known = find(key)
        if key is None or known is None:
            return self._run(key, func, args, kwargs)
        result, made = known.again(key.tensors, self._mode)
        for one in made:
            if one.device.type == self._device:
                self._take(one)
        if known.counted is not None:
            self.work.operators[known.counted] += 1
        return result

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Leave out a wrapper of torch that lets nothing here be compiled, which takes time at each call."""
        return False

    def _run(self, key: Key | None, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run an operator whose outcome is not known."""
        result = func(*args, **kwargs)
        outputs = [one for one in _tensors((result,)) if one.device.type == self._device]
        for output in outputs:
            self._take(output)
        inputs, counted = _tensors((*args, *kwargs.values())), None
        if _launches(func) and (outputs or any(one.device.type == self._device for one in inputs)):
            counted = _operator(func, args, kwargs, result, inputs, outputs)
            self.work.operators[counted] += 1
        remember(key, func, inputs, result, counted)
        return result

    def _take(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        size, weights = _held(storage.nbytes()), self._are_weights
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
    """Return whether an operator computes or copies anything, rather than making a view or fresh memory."""
    if func not in _LAUNCHES:
        returns = func._schema.returns
        view = any(one.alias_info is not None and not one.alias_info.is_write for one in returns)
        _LAUNCHES[func] = not (view or str(func).startswith(_FREE))
    return _LAUNCHES[func]


def _tensors(values: Sequence[Any]) -> list[torch.Tensor]:
    """List all tensors in arguments or results, those in nested lists included."""
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
    numbers = [one for one in inputs if one.is_floating_point()]
    itemsize = max(numbers, key=torch.Tensor.numel).element_size() if numbers else 4
    if packet in _COPIES:
        ends = [*inputs, *_tensors((result,))]
        if any(one.device.type == "cpu" for one in ends):
            return Operator("bus", itemsize, 0, _bytes(next(o for o in ends if o.device.type != "cpu")))
    if packet not in flop_registry:
        return Operator("other", itemsize, 0, moved)
    name = str(packet)
    kind = "attention" if "attention" in name else "convolution" if "conv" in name else "linear"
    return Operator(kind, itemsize, int(flop_registry[packet](*args, **kwargs, out_val=result)), moved)


def _held(size: int) -> int:
    """Bytes that the allocator takes for `size` bytes."""
    return -(-size // _BLOCK) * _BLOCK


def _bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's elements; expanded elements count once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
