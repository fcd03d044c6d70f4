"""Branch: the calls that have the same place in every step, such as those with the negative prompt."""

from __future__ import annotations

from dataclasses import dataclass

from spectrum.diffusers.call import Call
from spectrum.diffusers.outputs import Layout
from spectrum.track import Track


@dataclass(slots=True, eq=False)
class Branch:
    """History of one branch, and what its calls have in common.

    Attributes:
        track: its history.
        call: the call before; the next one must fit it.
        constant: whether the pipeline passes the prompt's tensors themselves at every step, not copies.
        layout: how a whole output is put together from the forecast of its tensors.
    """

    track: Track
    call: Call
    constant: bool = False
    layout: Layout | None = None

    def continued_by(self, call: Call) -> bool:
        """Whether `call` has the shapes and the prompt of the calls before it; it is remembered if so."""
        if call.form != self.call.form:
            return False
        same = call.has_condition_of(self.call)
        if not same and (self.constant or not call.equals_condition_of(self.call)):
            return False
        self.call, self.constant = call, same
        return True
