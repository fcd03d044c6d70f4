"""The coordinator: takes the decision of every step and keeps a digest that proves what was decided."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from spectrum import Schedule, StepKind


@dataclass(frozen=True, slots=True)
class Decision:
    """What the rank group does at one step."""

    step: int
    kind: StepKind


class Coordinator:
    """Agrees decisions; with one rank it asks the schedule and records the answer.

    Args:
        schedule: which steps are computed.
        identity: what the generation is a function of (request, model revision); the digest starts from it.
    """

    def __init__(self, schedule: Schedule, identity: str):
        self._schedule = schedule
        self._digest = hashlib.sha256(identity.encode())
        self._decisions: list[Decision] = []

    @property
    def computed(self) -> list[int]:
        """Steps decided to be computed so far."""
        return [d.step for d in self._decisions if d.kind is StepKind.COMPUTE]

    @property
    def digest(self) -> str:
        """Hex SHA-256 of the identity and every decision so far."""
        return self._digest.hexdigest()

    def decide(self, step: int) -> Decision:
        """The decision for `step`; asked once per step, in ascending order."""
        decision = Decision(step, self._schedule.kind(step))
        self._decisions.append(decision)
        self._digest.update(f"{step}:{decision.kind}\n".encode())
        return decision
