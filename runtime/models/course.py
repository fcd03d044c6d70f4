"""Course of a generation: which expert computes each step, and where histories start over.

It follows from the sampler's timesteps alone, so all ranks have the same one, and a resumed generation too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch

from runtime.models.base import ExpertSettings


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
    def of(
        cls,
        experts: Sequence[ExpertSettings],
        timesteps: torch.Tensor,
        history: Literal["fresh", "carried"] | None = None,
        warmup: int | None = None,
    ) -> Course:
        """Assign each timestep to the first expert whose boundary it reaches, as torch compares them.

        Args:
            experts: experts in the order of their steps.
            timesteps: timestep of every step.
            history, warmup: replace those of the experts' settings.

        Example:
            With boundaries 875 and 0, the timesteps 1000, 900, 500 go to the experts 0, 0, 1.
        """
        numbers = tuple(
            next((n for n, one in enumerate(experts) if timestep >= one.boundary), len(experts) - 1)
            for timestep in timesteps.cpu()
        )
        forgotten = frozenset(
            step for step in _switches(numbers) if (history or experts[numbers[step]].history) == "fresh"
        )
        names, warmups = tuple(one.name for one in experts), tuple(warmup or one.warmup for one in experts)
        return cls(names, numbers, forgotten, warmups)

    def name(self, step: int) -> str:
        """Return the name of the expert that computes a step."""
        return self.names[self.numbers[step]]

    def fresh(self, *, outputs: bool) -> dict[int, int]:
        """Return the steps before which a history is dropped, each with the number of steps that are computed
        from there on for lack of a history.

        Args:
            outputs: whether the history is of the model's output; if not, it is of features, which two
                experts never share.
        """
        switches = sorted(_switches(self.numbers))
        ends = dict(pairwise([*switches, len(self.numbers)]))
        dropped = self.outputs_forgotten if outputs else switches
        return {step: min(self.warmups[self.numbers[step]], ends[step] - step) for step in sorted(dropped)}

    def forced(self, *, outputs: bool) -> frozenset[int]:
        """Return the steps that are computed in any case, as there is no history; see `fresh`."""
        fresh = self.fresh(outputs=outputs)
        return frozenset(step for start, count in fresh.items() for step in range(start, start + count))

    def forgets(self, step: int, *, outputs: bool) -> bool:
        """Return whether a history is dropped before `step`; see `fresh`."""
        return step in self.fresh(outputs=outputs)


def _switches(numbers: Sequence[int]) -> frozenset[int]:
    """Return the steps at which another expert takes over."""
    return frozenset(step for step in range(1, len(numbers)) if numbers[step] != numbers[step - 1])
