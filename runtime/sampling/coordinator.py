"""Coordinator: decisions that all ranks share, and the proof that they do.

Every rank makes each decision by itself, from the same schedule and numbers, so no rank waits for it. As the
step begins, the ranks exchange a digest of all decisions so far, with their commands. The digests are
compared before the step's first transfer, which comes after a block's first projections, so the exchange
overlaps with computation; ranks that disagree never start transfers that do not match. A command given on
any rank takes effect at the same step on all.
"""

from __future__ import annotations

import hashlib
import math
import struct
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from runtime.errors import CancelledError, RankFailedError
from runtime.models.course import Course
from runtime.parallel.collectives import Transfer
from runtime.parallel.ranks import Ranks, minority
from runtime.sampling.commands import Command, Commands
from spectrum import AdaptiveSchedule, Pace, Schedule, SquaredError, Squares, StepKind, StepSeconds, Stopwatch


@dataclass(frozen=True, slots=True)
class Decision:
    """Decision of the rank group for one step.

    Attributes:
        step: index of the step.
        kinds: branch → compute or forecast.
        command: agreed by all ranks. `FORCE_COMPUTE` is already in `kinds`; `STOP` ends the generation after
            this step. There is no decision for a step before which it is cancelled.
        expert: name of the transformer that the step is of.
    """

    step: int
    kinds: Mapping[str, StepKind]
    command: Command = Command.NONE
    expert: str = ""

    @property
    def kind(self) -> StepKind:
        """Kind of the step: computed if any branch is."""
        return StepKind.COMPUTE if StepKind.COMPUTE in self.kinds.values() else StepKind.FORECAST


class _Record(NamedTuple):
    """Record that ranks exchange at a step.

    Attributes:
        left: seconds that the rank expects until the deadline, before the next step.
        computed, forecast: its typical seconds of a step; 0 where unknown.
    """

    step: int
    digest: bytes
    command: int
    left: float
    computed: float
    forecast: float

    def pack(self) -> torch.Tensor:
        return torch.frombuffer(bytearray(struct.pack(_LAYOUT, *self)), dtype=torch.uint8)

    @classmethod
    def unpack(cls, message: torch.Tensor) -> _Record:
        return cls(*struct.unpack(_LAYOUT, bytes(message.tolist())))


_LAYOUT = ">q32sBddd"
RECORD_BYTES = struct.calcsize(_LAYOUT)  # sent by every rank to every other at each step
_SHAPE = (RECORD_BYTES,)


@dataclass(frozen=True, slots=True)
class Deadline:
    """Deadline of denoising.

    Attributes:
        seconds: time limit, counted from the creation of the coordinator.
        kinds: expected kind of every step.
    """

    seconds: float
    kinds: Sequence[StepKind]

    def wanted(self, step: int) -> int:
        """Number of computed steps from `step` on."""
        return sum(kind is StepKind.COMPUTE for kind in self.kinds[step:])


class Coordinator:
    """Decides the steps of one generation, as one rank of the group.

    Args:
        schedules: branch → its schedule. Branches may share one.
        identity: recipe of the generation, as text; the digest of decisions starts from it.
        ranks: all ranks of the group.
        deadline: computed steps for which there is no time are forecast instead, by the first rank's clock.
        commands: commands given on this rank; the ranks agree on them. None by default.
        course: course of the experts; None for a model of one.
        forced: steps that are computed whatever schedules and deadline say, as there is nothing to forecast
            them from.

    Attributes:
        decisions: decisions so far, in order.
        digests: digests of the decisions, one per rank, as last compared.
        errors: step → relative error of a forecast, over all ranks and branches.
        dropped: steps that were forecast for lack of time.
    """

    def __init__(
        self,
        schedules: Mapping[str, Schedule],
        identity: str,
        ranks: Ranks,
        deadline: Deadline | None = None,
        commands: Commands | None = None,
        course: Course | None = None,
        forced: Collection[int] = (),
    ):
        self._course, self._forced = course, forced
        self.schedules, self._ranks = schedules, ranks
        self._distinct = list({id(schedule): schedule for schedule in schedules.values()}.values())
        self._adaptive = [s for s in self._distinct if isinstance(s, AdaptiveSchedule)]
        self._digest = hashlib.sha256(identity.encode())
        self._commands = commands or Commands()
        self._exchange: Transfer | None = None
        self._agreed = Command.NONE
        self._deadline, self._began = deadline, time.perf_counter()
        self._stopwatch, self._pace = Stopwatch(), Pace()
        self._left, self._typical = math.inf, StepSeconds()  # by the first rank's clock
        self._squares: dict[int, SquaredError] = {}
        self.decisions: list[Decision] = []
        self.digests: list[str] = []
        self.errors: dict[int, float] = {}
        self.dropped: list[int] = []

    def computed(self, branch: str) -> list[int]:
        """Computed steps of a branch so far; none for an unknown branch."""
        return [d.step for d in self.decisions if d.kinds.get(branch) is StepKind.COMPUTE]

    @property
    def digest(self) -> str:
        """Hex SHA-256 of the identity and every decision so far."""
        return self._digest.hexdigest()

    def decide(self, step: int) -> Decision:
        """Decide `step`; called once per step, in ascending order, on every rank.

        Raises:
            CancelledError: the generation was cancelled; nothing is decided, on any rank.
            RankFailedError: a rank disagreed about an earlier step, or has failed.
        """
        self.confirm()
        agreed = self._agreed
        self._ranks.at(f"step {step}")
        if agreed is Command.CANCEL:
            raise CancelledError(f"cancelled before step {step}")
        kinds = {id(schedule): schedule.kind(step) for schedule in self._distinct}
        if agreed is Command.FORCE_COMPUTE or step in self._forced:
            kinds = dict.fromkeys(kinds, StepKind.COMPUTE)
        elif StepKind.COMPUTE in kinds.values() and not self._in_time(step):
            kinds = dict.fromkeys(kinds, StepKind.FORECAST)
            self.dropped.append(step)
        decision = Decision(
            step,
            {branch: kinds[id(schedule)] for branch, schedule in self.schedules.items()},
            agreed,
            self._expert(step),
        )
        self._take(decision)
        self._begin_exchange(step)
        return decision

    def _expert(self, step: int) -> str:
        return "" if self._course is None else self._course.name(step)

    def _in_time(self, step: int) -> bool:
        """Return whether there is time to compute this wanted step, equally on all ranks."""
        if self._deadline is None or not self.decisions:
            return True
        wanted, steps_left = self._deadline.wanted(step), len(self._deadline.kinds) - step
        return self._pace.allows(self._left, self._typical, wanted, steps_left)

    def timed(self, seconds: float) -> None:
        """Note that the step decided last took `seconds` on this rank."""
        self._stopwatch.add(self.decisions[-1].kind, seconds)

    def _take(self, decision: Decision) -> None:
        self.decisions.append(decision)
        chosen = ",".join(f"{branch}={kind}" for branch, kind in decision.kinds.items())
        self._digest.update(f"{decision.step}:{chosen}:{decision.command:d}:{decision.expert}\n".encode())

    def observe(self, step: int, squares: Squares | None) -> None:
        """Take the error that forecasts of a computed step would have had on this rank's shard.

        It reads the numbers, so call it after a synchronisation of the accelerator. The ranks add the errors
        up at once only for adaptive schedules; otherwise at the end.
        """
        self._squares[step] = SquaredError(0.0, 0.0) if squares is None else squares.read()
        if not self._adaptive:
            return
        self._sum_errors()
        if step in self.errors:  # there was something to forecast it from
            for schedule in self._adaptive:
                schedule.observe(step, self.errors[step])

    def error_of(self, step: int) -> float | None:
        """Return the relative error of a computed step's forecast, on this rank's shard until the ranks have
        added theirs up; None if there was nothing to forecast it from."""
        own = self._squares.get(step)
        if own is not None:
            return math.sqrt(own.error / own.truth) if own.truth else None
        return self.errors.get(step)

    def state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """State for a checkpoint: decisions, equal on every rank; and this rank's sums not yet added up."""
        decisions = [
            [d.step, {branch: str(kind) for branch, kind in d.kinds.items()}, int(d.command)]
            for d in self.decisions
        ]
        squares = {step: list(squares) for step, squares in self._squares.items()}
        shared = {
            "decisions": decisions,
            "errors": dict(self.errors),
            "dropped": list(self.dropped),
            "credit": self._pace.credit,
        }
        return shared, {"squares": squares}

    def restore(self, shared: dict[str, Any], own: list[dict[str, Any]], share: float) -> None:
        """Resume from a `state`.

        Args:
            shared: decisions.
            own: sums of one or several former ranks, which are added up.
            share: this rank's share of the sums: 1, or 0 where another rank takes them over.
        """
        for step, kinds, command in shared["decisions"]:
            named = {branch: StepKind(kind) for branch, kind in kinds.items()}
            given = Command(command)
            # An earlier stop is not a decision about the video, which is the same with and without it.
            kept = Command.NONE if given >= Command.STOP else given
            self._take(Decision(step, named, kept, self._expert(step)))
        self.errors, self.dropped = dict(shared["errors"]), list(shared["dropped"])
        self._pace.credit = shared["credit"]
        for step, error in sorted(self.errors.items()):
            for schedule in self._adaptive:
                schedule.observe(step, error)
        for one in own:
            for step, (error, truth) in one["squares"].items():
                before = self._squares.get(step, SquaredError(0.0, 0.0))
                self._squares[step] = SquaredError(before.error + share * error, before.truth + share * truth)

    def finish(self) -> None:
        """Compare the last digests and add up the errors, so that `digests` and `errors` cover all ranks.

        Raises:
            RankFailedError: a rank disagreed, or has failed.
        """
        self.confirm()
        self._sum_errors()

    def _begin_exchange(self, step: int) -> None:
        left, typical = self._expected()
        seconds = left, typical.computed or 0.0, typical.forecast or 0.0
        message = _Record(step, self._digest.digest(), self._commands.take(), *seconds).pack()
        control = self._ranks.control
        self._exchange = control.start([message] * control.size, [_SHAPE] * control.size)
        self._ranks.before_transfer(self.confirm)

    def _expected(self) -> tuple[float, StepSeconds]:
        """Seconds left at the end of the step that begins now, as expected, and typical seconds of a step."""
        if self._deadline is None:
            return math.inf, StepSeconds()
        left = self._deadline.seconds - (time.perf_counter() - self._began)
        typical = self._stopwatch.typical
        return left - (typical.of(self.decisions[-1].kind) or 0.0), typical

    def confirm(self) -> None:
        """Check that all ranks have made the same decisions so far.

        Raises:
            RankFailedError: a rank disagreed, or has failed.
        """
        if self._exchange is None:
            return
        messages, self._exchange = self._exchange.wait(), None
        records = [_Record.unpack(message) for message in messages]
        odd = minority([repr(record[:2]) for record in records])
        if odd is not None:
            own = records[odd[0]]
            usual = next(record for rank, record in enumerate(records) if rank not in odd)
            reason = (
                f"it is at step {own.step}, the other ranks are at step {usual.step}"
                if own.step != usual.step
                else "its decisions differ from the other ranks'"
            )
            raise RankFailedError(odd[0], f"step {own.step}", reason)
        self.digests = [record.digest.hex() for record in records]
        self._left, self._typical = records[0].left, StepSeconds(records[0].computed, records[0].forecast)
        self._agreed = Command(max(record.command for record in records))

    def _sum_errors(self) -> None:
        """Turn sums of squares over ranks and branches into relative errors, the same bits on every rank."""
        flat = [value for squares in self._squares.values() for value in squares]
        sums = iter(self._ranks.control.sum(flat)) if flat else iter(())
        for step, error, truth in zip(self._squares, sums, sums, strict=True):
            if truth:
                self.errors[step] = math.sqrt(error / truth)
        self._squares.clear()
