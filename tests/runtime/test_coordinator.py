"""Decisions, the digest that proves them, and commands. Many ranks: test_ranks.py and test_failures.py."""

from __future__ import annotations

import pytest
import torch

from runtime.coordinator import Command, Coordinator, Decision
from runtime.ranks import Ranks
from spectrum import ErrorSchedule, FixedSchedule, Schedule, SquaredError, StepKind

COMPUTE, FORECAST = StepKind.COMPUTE, StepKind.FORECAST


def coordinator(cond: Schedule, uncond: Schedule | None = None, identity: str = "request") -> Coordinator:
    ranks = Ranks.alone(torch.device("cpu"))
    return Coordinator({"cond": cond, "uncond": uncond or cond}, identity, ranks)


def digest(schedule: FixedSchedule, identity: str = "request") -> str:
    one = coordinator(schedule, identity=identity)
    for step in range(schedule.steps):
        one.decide(step)
    one.finish()
    assert one.digests == [one.digest]
    return one.digest


def test_decisions_follow_the_schedule() -> None:
    one = coordinator(FixedSchedule(4, (0, 2)))
    assert [one.decide(step).kind for step in range(4)] == [COMPUTE, FORECAST] * 2
    assert one.computed("cond") == one.computed("uncond") == [0, 2]


def test_branches_may_follow_their_own() -> None:
    one = coordinator(FixedSchedule(3, (0, 1)), FixedSchedule(3, (0, 2)))
    decisions = [one.decide(step) for step in range(3)]
    assert decisions[1] == Decision(1, {"cond": COMPUTE, "uncond": FORECAST})
    assert [d.kind for d in decisions] == [COMPUTE] * 3
    assert (one.computed("cond"), one.computed("uncond")) == ([0, 1], [0, 2])


def test_digest_tells_schedules_and_requests_apart() -> None:
    same = digest(FixedSchedule(6, (0, 3)))
    assert same == digest(FixedSchedule(6, (0, 3)))
    assert same != digest(FixedSchedule(6, (0, 4)))
    assert same != digest(FixedSchedule(6, (0, 3)), "another request")


def test_the_strongest_command_holds_from_the_next_step_that_can_agree_on_it() -> None:
    one = coordinator(FixedSchedule(4, (0,)))
    one.decide(0)
    one.command(Command.FORCE_COMPUTE)
    assert one.decide(1).command is Command.NONE  # sent with this decision
    assert one.decide(2) == Decision(2, {"cond": COMPUTE, "uncond": COMPUTE}, Command.FORCE_COMPUTE)
    one.command(Command.STOP)
    one.command(Command.CANCEL)
    one.command(Command.STOP)
    assert one.decide(3) == Decision(3, {"cond": FORECAST, "uncond": FORECAST})
    assert one.decide(4).command is Command.CANCEL


def test_errors_are_added_up_at_the_end() -> None:
    one = coordinator(FixedSchedule(3, (0, 1, 2)))
    for step, squares in enumerate((None, SquaredError(1.0, 4.0), SquaredError(2.0, 2.0))):
        one.decide(step)
        one.observe(step, squares)
    assert one.errors == {}
    one.finish()
    assert one.errors == {1: 0.5, 2: 1.0}


def test_a_schedule_that_goes_by_errors_is_told_at_once() -> None:
    one = coordinator(ErrorSchedule(9, tolerance=0.1, warmup=2))
    for step, squares in ((0, None), (1, SquaredError(0.01**2, 1.0))):
        one.decide(step)
        one.observe(step, squares)
    assert one.errors == {1: pytest.approx(0.01)}
    assert [one.decide(step).kind for step in (2, 3)] == [FORECAST, COMPUTE]
