"""Counter: steps told from the calls of a transformer alone, where no scheduler tells them."""

from __future__ import annotations

from spectrum.diffusers.call import Call


class Counter:
    """Counts the steps of one generation.

    A step ends when a call with the same context comes again; without contexts, when the timestep changes.
    """

    def __init__(self) -> None:
        self._index = -1
        self._served: dict[str | None, int] = {}  # context → calls in this step
        self._times: list[float] = []  # timesteps of the last two steps
        self._calls: dict[tuple[str | None, int], Call] = {}

    def count(self, call: Call) -> int:
        """Return the index of the step of `call`."""
        index = self._next(call)
        if index != self._index:
            self._index, self._served = index, {}
            self._times = [*self._times[-1:], call.time()]
        ordinal = self._served.get(call.context, 0)
        self._served[call.context] = ordinal + 1
        self._calls[call.context, ordinal] = call
        return index

    def continued_by(self, call: Call) -> bool:
        """Whether `call` can belong to this generation, judging by its arguments alone."""
        index = self._next(call)
        ordinal = self._served.get(call.context, 0) if index == self._index else 0
        before = self._calls.get((call.context, ordinal))
        if before is not None and not (call.form == before.form and call.has_condition_of(before)):
            return False
        if call.context is None and index == self._index and self._repeats(call):
            return False
        if index <= self._index:
            return index == self._index and not (call.step is not None and call.context in self._served)
        if not self._times or call.timestep is None:
            return True
        change = call.time() - self._times[-1]
        return change * (self._times[-1] - self._times[-2]) > 0.0 if len(self._times) > 1 else change != 0.0

    def _repeats(self, call: Call) -> bool:
        """Whether a call without a context has the very prompt of an earlier one of the same step."""
        earlier = (self._calls[None, ordinal] for ordinal in range(self._served.get(None, 0)))
        return bool(call.condition) and any(call.has_condition_of(one) for one in earlier)

    def _next(self, call: Call) -> int:
        if call.step is not None:
            return call.step
        if self._index < 0:
            return 0
        if call.context is not None:
            return self._index + (call.context in self._served)
        return self._index + (call.time() != self._times[-1])
