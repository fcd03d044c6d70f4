"""Clock: whether a call's timestep is the one that the scheduler is at."""

from __future__ import annotations

from collections.abc import Callable

import torch

from spectrum.diffusers.call import Call

_Form = Callable[[float, float], float]
_FORMS: tuple[_Form, ...] = (
    lambda time, range_: time,
    lambda time, range_: time / range_,
    lambda time, range_: range_ - time,
    lambda time, range_: 1.0 - time / range_,
)
"""How pipelines hand a timestep to their transformer."""


class Clock:
    """Compares timesteps, once it has learned from a first call in which form the pipeline passes them.

    Args:
        timesteps: the scheduler's list.
        range_: number of timesteps of training, from which they count down.
    """

    def __init__(self, timesteps: torch.Tensor, range_: float):
        self._times: list[float] = timesteps.flatten().tolist()
        self._range = range_
        self._forms: tuple[_Form, ...] | None = None  # those that fit so far; None before the first call

    def learn(self, call: Call, index: int) -> None:
        """Learn the form from the first call, which is at step `index`; waits for the device."""
        if self._forms is None:
            self._forms = () if call.timestep is None else self._fitting(_FORMS, call, index)

    @property
    def is_blind(self) -> bool:
        """Whether timesteps are passed in no known form."""
        return self._forms == ()

    def find(self, call: Call, begin: int = 0) -> int | None:
        """Find the first step from `begin` on that has the timestep of `call`; waits for the device.

        The first call decides in which form timesteps are passed.
        """
        for form in (_FORMS if self._forms is None else self._forms) if call.timestep is not None else ():
            for index in range(begin, len(self._times)):
                if self._fits(form, call, self._times[index]):
                    self._forms = (form,)
                    return index
        self._forms = self._forms or ()
        return None

    def agrees(self, call: Call, index: int) -> bool:
        """Whether `call` can be at step `index`, if any form is known; waits for the device."""
        if not self._forms:
            return True
        fitting = self._fitting(self._forms, call, index)
        self._forms = fitting or self._forms
        return bool(fitting)

    def shows(self, call: Call, time: float) -> bool:
        """Whether `call` has the timestep `time`, in a form that is known; waits for the device."""
        return any(self._fits(form, call, time) for form in self._forms or ())

    def _fitting(self, forms: tuple[_Form, ...], call: Call, index: int) -> tuple[_Form, ...]:
        return tuple(form for form in forms if self._fits(form, call, self._times[index]))

    def _fits(self, form: _Form, call: Call, time: float) -> bool:
        assert call.timestep is not None
        dtype = call.timestep.dtype
        precision = torch.finfo(dtype).eps if dtype.is_floating_point else 0.0
        full = abs(form(0.0, self._range) - form(self._range, self._range))
        return abs(form(time, self._range) - call.time()) <= full * (precision + 1e-4)
