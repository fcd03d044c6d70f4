"""Decisions and the digest that proves them."""

from __future__ import annotations

from runtime.coordinator import Coordinator
from spectrum import FixedSchedule, StepKind


def digest(schedule: FixedSchedule, identity: str = "request") -> str:
    coordinator = Coordinator(schedule, identity)
    for step in range(schedule.steps):
        coordinator.decide(step)
    return coordinator.digest


def test_decisions_follow_the_schedule() -> None:
    coordinator = Coordinator(FixedSchedule(4, (0, 2)), "")
    kinds = [coordinator.decide(step).kind for step in range(4)]
    assert kinds == [StepKind.COMPUTE, StepKind.FORECAST] * 2
    assert coordinator.computed == [0, 2]


def test_digest_tells_schedules_and_requests_apart() -> None:
    same = digest(FixedSchedule(6, (0, 3)))
    assert same == digest(FixedSchedule(6, (0, 3)))
    assert same != digest(FixedSchedule(6, (0, 4)))
    assert same != digest(FixedSchedule(6, (0, 3)), "another request")
