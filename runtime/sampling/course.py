"""Course of a generation: which expert computes each step, and where histories start over.

It follows from the sampler's timesteps alone, so all ranks have the same one, and a resumed generation too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from runtime.models.base import Expert


@dataclass(frozen=True, slots=True)
class Course:
    """Assignment of experts to steps.

    Attributes:
        names: names of the experts.
        numbers: index of each step's expert.
        outputs_forgotten: steps before which histories of the model's output are dropped.
        warmups: for each expert, number of steps that are computed after a history was dropped.
    """

    names: tuple[str, ...]
    numbers: tuple[int, ...]
    outputs_forgotten: frozenset[int] = frozenset()
    warmups: tuple[int, ...] = ()

    @classmethod
    def of(cls, experts: Sequence[Expert], timesteps: Sequence[float]) -> Course:
        """Assign each timestep to the first expert whose boundary it reaches.

        Example:
            With boundaries 875 and 0, the timesteps 1000, 900, 500 go to the experts 0, 0, 1.
        """
        numbers = tuple(
            next((n for n, one in enumerate(experts) if timestep >= one.boundary), len(experts) - 1)
            for timestep in timesteps
        )
        forgotten = frozenset(
            step for step in _switches(numbers) if experts[numbers[step]].history == "fresh"
        )
        names, warmups = tuple(one.name for one in experts), tuple(max(one.warmup, 1) for one in experts)
        return cls(names, numbers, forgotten, warmups)

    def name(self, step: int) -> str:
        """Return the name of the expert that computes a step."""
        return self.names[self.numbers[step]]

    def forgets(self, step: int, *, outputs: bool) -> bool:
        """Return whether a history is dropped before `step`, as it says nothing about later steps.

        Args:
            outputs: whether the history is of the model's output; if not, it is of features, which two
                experts never share.
        """
        return step in (self.outputs_forgotten if outputs else _switches(self.numbers))

    def forced(self, *, outputs: bool) -> frozenset[int]:
        """Return the steps that are computed whatever the schedule says, for lack of a history.

        Args:
            outputs: as in `forgets`.
        """
        found: set[int] = set()
        for switch in self.outputs_forgotten if outputs else _switches(self.numbers):
            expert = self.numbers[switch]
            steps = range(switch, min(switch + self.warmups[expert], len(self.numbers)))
            found.update(step for step in steps if self.numbers[step] == expert)
        return frozenset(found)


def _switches(numbers: Sequence[int]) -> frozenset[int]:
    """Return the steps at which another expert takes over."""
    return frozenset(step for step in range(1, len(numbers)) if numbers[step] != numbers[step - 1])
