"""Decisions, the digest that proves them, and commands. Many ranks: test_ranks.py and test_failures.py."""

from __future__ import annotations

from collections.abc import Sequence
from threading import Thread

import pytest
import torch

from runtime.errors import CancelledError
from runtime.parallel.collectives import Peers, Shape, Traffic, Transfer, Unguarded
from runtime.parallel.ranks import Ranks
from runtime.sampling.commands import Command, Commands
from runtime.sampling.coordinator import Coordinator, Decision
from spectrum import ErrorSchedule, FixedSchedule, Schedule, Squares, StepKind

COMPUTE, FORECAST = StepKind.COMPUTE, StepKind.FORECAST


def squares(error: float, truth: float) -> Squares:
    return Squares(*(torch.tensor(value, dtype=torch.float64) for value in (error, truth)))


ALONE = Ranks.alone(torch.device("cpu"))


def coordinator(
    cond: Schedule,
    uncond: Schedule | None = None,
    identity: str = "request",
    commands: Commands | None = None,
    ranks: Ranks = ALONE,
) -> Coordinator:
    return Coordinator({"cond": cond, "uncond": uncond or cond}, identity, ranks, commands=commands)


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
    commands = Commands()
    one = coordinator(FixedSchedule(4, (0,)), commands=commands)
    one.decide(0)
    commands.give(Command.FORCE_COMPUTE)
    assert one.decide(1).command is Command.NONE  # sent with this decision
    assert one.decide(2) == Decision(2, {"cond": COMPUTE, "uncond": COMPUTE}, Command.FORCE_COMPUTE)
    commands.give(Command.STOP)
    commands.give(Command.CANCEL)
    commands.give(Command.STOP)
    assert one.decide(3) == Decision(3, {"cond": FORECAST, "uncond": FORECAST})
    with pytest.raises(CancelledError, match="cancelled before step 4"):
        one.decide(4)
    assert [decision.step for decision in one.decisions] == [0, 1, 2, 3]


class _Interrupted(Peers):
    """A rank to which a signal comes just when its message of a step is on its way."""

    def __init__(self, commands: Commands, command: Command):
        super().__init__(None, Unguarded(), Traffic())
        self._signal = [(commands, command)]

    def start(self, pieces: Sequence[torch.Tensor], shapes: Sequence[Shape]) -> Transfer:
        transfer = super().start(pieces, shapes)
        while self._signal:
            commands, command = self._signal.pop()
            commands.give(command)
        return transfer


def told(one: Coordinator, step: int) -> Command:
    """What was agreed on before `step`."""
    try:
        return one.decide(step).command
    except CancelledError:
        return Command.CANCEL


@pytest.mark.parametrize("command", [Command.FORCE_COMPUTE, Command.STOP, Command.CANCEL])
def test_a_command_that_comes_while_the_step_is_told_is_not_lost(command: Command) -> None:
    commands = Commands()
    peers = _Interrupted(commands, command)
    ranks = Ranks(torch.device("cpu"), Traffic(), everyone=peers, control=peers, node=peers)
    one = coordinator(FixedSchedule(4, (0,)), commands=commands, ranks=ranks)
    assert [told(one, step) for step in range(3)] == [Command.NONE, Command.NONE, command]


def test_a_stop_is_seen_by_whoever_comes_later() -> None:
    commands = Commands()
    first = coordinator(FixedSchedule(1, (0,)), commands=commands)
    first.decide(0)
    commands.give(Command.STOP)
    first.finish()
    for _ in range(2):
        later = coordinator(FixedSchedule(2, (0,)), commands=commands)
        assert [later.decide(step).command for step in range(2)] == [Command.NONE, Command.STOP]


def test_commands_of_many_threads_all_count() -> None:
    """One thread for each command, against one that takes them: what was asked for is never less again."""
    commands, taken = Commands(), [Command.NONE]
    threads = [Thread(target=commands.give, args=(command,)) for command in [*Command] * 50]
    for thread in threads:
        thread.start()
        taken.append(commands.take())
    for thread in threads:
        thread.join()
    taken.append(commands.take())
    stopped = next(at for at, command in enumerate(taken) if command >= Command.STOP)
    assert Command.FORCE_COMPUTE in taken[: stopped + 1]
    assert taken[stopped:] == sorted(taken[stopped:]) and taken[-1] is Command.CANCEL


def test_errors_are_added_up_at_the_end() -> None:
    one = coordinator(FixedSchedule(3, (0, 1, 2)))
    for step, found in enumerate((None, squares(1.0, 4.0), squares(2.0, 2.0))):
        one.decide(step)
        one.observe(step, found)
    assert one.errors == {}
    one.finish()
    assert one.errors == {1: 0.5, 2: 1.0}


def test_a_schedule_that_goes_by_errors_is_told_at_once() -> None:
    one = coordinator(ErrorSchedule(9, tolerance=0.1, warmup=2))
    for step, found in ((0, None), (1, squares(0.01**2, 1.0))):
        one.decide(step)
        one.observe(step, found)
    assert one.errors == {1: pytest.approx(0.01)}
    assert [one.decide(step).kind for step in (2, 3)] == [FORECAST, COMPUTE]
