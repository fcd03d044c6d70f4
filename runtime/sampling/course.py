"""The course of a generation: which expert computes each step, and where histories begin anew.

Everything follows from the sampler's timesteps, so all ranks know it alike, and so does a resumed generation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from runtime.models.base import Expert


@dataclass(frozen=True, slots=True)
class Course:
    """Which expert computes each step.

    Attributes:
        names: of the experts.
        numbers: of every step's expert.
        outputs_forgotten: steps before which histories of the model's output are forgotten.
        warmups: the first steps of each expert that are computed, where histories are forgotten before them.
    """

    names: tuple[str, ...]
    numbers: tuple[int, ...]
    outputs_forgotten: frozenset[int] = frozenset()
    warmups: tuple[int, ...] = ()

    @classmethod
    def of(cls, experts: Sequence[Expert], timesteps: Sequence[float]) -> Course:
        """The course of a sampler's timesteps: a step is the first expert's whose boundary it reaches.

        Example: with boundaries 875 and 0, timesteps 1000, 900, 500 are of the experts 0, 0, 1.
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
        """The expert that a step is of."""
        return self.names[self.numbers[step]]

    def forgets(self, step: int, *, outputs: bool) -> bool:
        """Whether what is remembered says nothing of `step` and those after it.

        Args:
            outputs: whether it is of the model's output; otherwise it is of features, which no two experts
                have in common.
        """
        return step in (self.outputs_forgotten if outputs else _switches(self.numbers))

    def forced(self, *, outputs: bool) -> frozenset[int]:
        """Steps that must be computed whatever a schedule says, as there is nothing to forecast them from.

        Args:
            outputs: as of `forgets`.
        """
        found: set[int] = set()
        for switch in self.outputs_forgotten if outputs else _switches(self.numbers):
            expert = self.numbers[switch]
            steps = range(switch, min(switch + self.warmups[expert], len(self.numbers)))
            found.update(step for step in steps if self.numbers[step] == expert)
        return frozenset(found)


def _switches(numbers: Sequence[int]) -> frozenset[int]:
    """Steps that are of another expert than the step before."""
    return frozenset(step for step in range(1, len(numbers)) if numbers[step] != numbers[step - 1])
