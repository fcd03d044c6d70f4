"""Whatever happens to one rank, all others end soon, with an error that names it and where it was."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

import runtime.versions
from runtime.engine import Engine
from runtime.errors import BadRequestError
from runtime.jobs.run import do_job
from runtime.media.mp4 import FrameBuffer, Frames
from runtime.models.wan.vae import _CausalDecoder
from runtime.parallel.ranks import Ranks
from runtime.request.config import Config, Tiles, load_config
from runtime.request.outputs import Outputs
from runtime.sampling.commands import Command
from runtime.sampling.denoise import StepRecord
from runtime.sampling.plan import Plan
from runtime.sampling.run import Run
from spectrum import FixedSchedule, Schedule
from tests.jobs import job_of
from tests.ranks import Outcome, block, die, run_ranks, stop, watch_ranks

TIMEOUT = 5.0  # seconds
BUSY = 3.0  # seconds
STEP = 3  # at which things happen
SLACK = 4.0  # seconds that a busy machine may add to noticing
WORLD, ODD = 3, 1  # ranks, and which of them misbehaves
SMALL = {"width": 64, "height": 48, "frames": 5, "max_sequence_length": 32, "spectrum": "paper"}


def make(
    ranks: Ranks,
    *,
    config: Config | None = None,
    kind: type[Engine] = Engine,
    on_step: Callable[[Engine, StepRecord], None] = lambda engine, record: None,
    **fields: Any,
) -> float:
    """Make a small video as one of the ranks; `on_step` is what happens on the odd one."""
    engine = kind(config or load_config("wan-tiny"), ranks)
    given = {**SMALL, "steps": 6}
    request = engine.config.request("a red circle moving left on a black background", **{**given, **fields})
    odd = ranks.rank == ODD

    def after(record: StepRecord) -> None:
        if odd and record.index == STEP - 1:
            on_step(engine, record)

    engine.generate(request, [FrameBuffer()] if ranks.is_leader else [], after)
    return time.monotonic()


def other_seed(ranks: Ranks) -> None:
    make(ranks, seed=8 if ranks.rank == ODD else 7)


def other_config(ranks: Ranks) -> None:
    config = load_config("wan-tiny")
    if ranks.rank == ODD:
        config = config.model_copy(update={"dtype": config.dtype.model_copy(update={"vae": "bfloat16"})})
    make(ranks, config=config)


def other_library(ranks: Ranks) -> None:
    """Another diffusers on one machine: its sampler may step the same latents to others."""
    known = importlib.metadata.version
    odd = {"diffusers": "0.1"} if ranks.rank == ODD else {}
    with patch.object(runtime.versions, "version", lambda name: odd.get(name) or known(name)):
        make(ranks)


def other_preset(ranks: Ranks) -> None:
    make(ranks, spectrum="paper-fast" if ranks.rank == ODD else "paper")


def other_schedule(ranks: Ranks) -> None:
    """The request is the same, but one rank decides otherwise: as if its memory or code were broken."""

    make(ranks, kind=_OddEngine if ranks.rank == ODD else Engine)


class _OddPlan(Plan):
    def fresh_schedules(self) -> dict[str, Schedule]:
        return dict.fromkeys(("cond", "uncond"), FixedSchedule(6, range(STEP)))


class _OddEngine(Engine):
    def prepare(self, plan: Plan) -> Run:
        fields = {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)}
        return dataclasses.replace(super().prepare(plan), plan=_OddPlan(**fields))


def killed(ranks: Ranks) -> None:
    make(ranks, on_step=lambda *_: die())


def stopped(ranks: Ranks) -> None:
    make(ranks, on_step=lambda *_: stop())


def stalled(ranks: Ranks) -> None:
    """Alive, but stuck in something else."""
    make(ranks, on_step=lambda *_: time.sleep(2 * TIMEOUT))


def raising(ranks: Ranks) -> None:
    def fail(engine: Engine, record: StepRecord) -> None:
        raise OSError("No space left on device")

    make(ranks, on_step=fail)


def leaving(ranks: Ranks) -> None:
    """One rank ends well, but too early."""
    if ranks.rank != ODD:
        make(ranks)


def check(outcomes: list[Outcome], where: str, reason: str) -> None:
    for rank, outcome in enumerate(outcomes):
        if rank == ODD:
            continue
        assert outcome.code == 3, outcome
        assert outcome.error is not None
        kind, blamed, place, message = outcome.error
        assert (kind, blamed) == ("RankFailedError", ODD), message
        assert where in place, message
        assert reason in message


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("task", "where", "reason", "code"),
    [
        (other_seed, "the start of a generation", "request.seed = 8 where other ranks have 7", 3),
        (other_config, "loading", "dtype.vae = 'bfloat16' where other ranks have 'float32'", 3),
        (other_library, "loading", "versions.diffusers = '0.1' where other ranks have", 3),
        (other_preset, "the start of a generation", "preset.schedule.alpha = 3.0", 3),
        (other_schedule, f"step {STEP}", "its decisions differ from the other ranks'", 3),
        (killed, f"step {STEP - 1}", "died", -9),
        (stopped, f"step {STEP - 1}", "no sign of life", -9),
        (stalled, f"step {STEP - 1}", "it has not arrived", 3),
        (raising, f"step {STEP - 1}", "OSError: No space left on device", 3),
        (leaving, "start", "it has ended", 0),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_one_rank_fails_and_all_others_end(
    task: Callable[[Ranks], None], where: str, reason: str, code: int
) -> None:
    outcomes = watch_ranks(WORLD, task, timeout=TIMEOUT)
    check(outcomes, where, reason)
    assert outcomes[ODD].code == code
    ends = [outcome.ended for rank, outcome in enumerate(outcomes) if rank != ODD]
    assert max(ends) - min(ends) < TIMEOUT + SLACK


def host_dies(ranks: Ranks) -> None:
    """The first rank holds the store through which the others watch each other."""

    def after(record: StepRecord) -> None:
        if ranks.is_leader and record.index == STEP - 1:
            die()

    engine = Engine(load_config("wan-tiny"), ranks)
    request = engine.config.request("a red circle", **SMALL, steps=6)
    engine.generate(request, [FrameBuffer()] if ranks.is_leader else [], after)


@pytest.mark.timeout(120)
def test_the_rank_that_holds_the_store_dies() -> None:
    first, *others = watch_ranks(WORLD, host_dies, timeout=TIMEOUT)
    assert first.code == -9
    for outcome in others:
        assert outcome.code == 3 and outcome.error is not None
        assert outcome.error[:2] == ("RankFailedError", 0)
        assert outcome.error[2] in (f"step {STEP - 1}", f"step {STEP}")  # where the others are


NODES = ("one", "one", "two", "two")  # the machine of each rank


def node_dies(ranks: Ranks, lost: str) -> None:
    """All ranks of a node end at once, and nobody else can look at their processes."""
    engine = Engine(load_config("wan-tiny"), ranks)
    request = engine.config.request("a red circle", **SMALL, steps=6)

    def after(record: StepRecord) -> None:
        if NODES[ranks.rank] == lost and record.index == STEP - 1:
            die()

    engine.generate(request, [FrameBuffer()] if ranks.is_leader else [], after)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("lost", ["two", "one"])
def test_a_node_that_is_lost_ends_the_ranks_of_the_other(lost: str) -> None:
    """The second is only silent; with the first, the store is gone."""
    outcomes = watch_ranks(len(NODES), node_dies, lost, timeout=TIMEOUT, hosts=NODES)
    ends = []
    for node, outcome in zip(NODES, outcomes, strict=True):
        if node == lost:
            assert outcome.code == -9
            continue
        assert outcome.code == 3 and outcome.error is not None
        kind, blamed, where, message = outcome.error
        assert kind == "RankFailedError" and blamed is not None and NODES[blamed] == lost, message
        assert where in (f"step {STEP - 1}", f"step {STEP}")
        assert "no sign of life" in message
        ends.append(outcome.ended)
    assert max(ends) - min(ends) < TIMEOUT + SLACK


class _Full:
    def write(self, frames_THW3: Frames) -> None:
        raise OSError("No space left on device")


def full_disk(ranks: Ranks) -> None:
    """The first rank fails while it writes; the others wait for the next generation."""
    engine = Engine(load_config("wan-tiny"), ranks)
    request = engine.config.request("a red circle", **SMALL, steps=2)
    for _ in range(2):
        engine.generate(request, [_Full()] if ranks.is_leader else [])


@pytest.mark.timeout(120)
def test_writing_fails() -> None:
    first, *others = watch_ranks(2, full_disk, timeout=TIMEOUT)
    assert first.code == 3 and first.error is not None and first.error[0] == "OSError"
    for outcome in others:
        assert outcome.code == 3 and outcome.error is not None
        assert outcome.error[:3] == ("RankFailedError", 0, "decoding")
        assert "No space left" in outcome.error[3]


def commanded(ranks: Ranks, command: Command) -> list[int]:
    """Commands come from any rank; here from the odd one, after step 2."""
    engine = Engine(load_config("wan-tiny"), ranks)
    request = engine.config.request("a red circle", **SMALL, steps=8)
    seen: list[int] = []

    def after(record: StepRecord) -> None:
        seen.append(record.index)
        if ranks.rank == ODD and record.index == STEP - 1:
            engine.command(command)

    result = engine.generate(request, [FrameBuffer()] if ranks.is_leader else [], after)
    assert seen == list(range(8))
    return result.computed["cond"]


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("command", "said"),
    [(Command.CANCEL, "cancelled before step 4"), (Command.STOP, "stopped after step 4")],
)
def test_a_command_ends_all_ranks_at_one_step(command: Command, said: str) -> None:
    for outcome in watch_ranks(2, commanded, command, timeout=TIMEOUT):
        assert outcome.code == 130
        assert outcome.error is not None and outcome.error[0] == "CancelledError"
        assert said in outcome.error[3]


@pytest.mark.timeout(120)
def test_a_step_can_be_forced_to_be_computed() -> None:
    """It is decided at step 3, agreed on during it, and step 5 would have been a forecast."""
    for outcome in watch_ranks(2, commanded, Command.NONE, timeout=TIMEOUT):
        assert outcome.result == [0, 1, 2, 3, 4, 6]
    for outcome in watch_ranks(2, forced, timeout=TIMEOUT):
        assert outcome.result == [0, 1, 2, 3, 4, 5, 6]


def forced(ranks: Ranks) -> list[int]:
    engine = Engine(load_config("wan-tiny"), ranks)
    request = engine.config.request("a red circle", **SMALL, steps=8)

    def after(record: StepRecord) -> None:
        if ranks.rank == ODD and record.index == 3:
            engine.command(Command.FORCE_COMPUTE)

    return engine.generate(request, [FrameBuffer()] if ranks.is_leader else [], after).computed["cond"]


def blocked(ranks: Ranks, how: Callable[[], None]) -> None:
    """The odd rank fails while all others are in a call of their device's driver."""
    ranks.control.all_gather_object("all are here")
    ranks.at("step 3")
    if ranks.rank == ODD:
        ranks.control.start([torch.zeros(1)] * WORLD, [(1,)] * WORLD)  # so that its place is known
        how()
    block()


def raise_it() -> None:
    raise OSError("No space left on device")


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("how", "reason"), [(raise_it, "No space left on device"), (die, "died")])
def test_ranks_that_are_stuck_in_c_are_ended_and_name_who_failed(
    how: Callable[[], None], reason: str
) -> None:
    outcomes = watch_ranks(WORLD, blocked, how, timeout=TIMEOUT)
    for rank, outcome in enumerate(outcomes):
        if rank != ODD:
            assert outcome.code == 3 and outcome.error is not None
            assert outcome.error[:2] == ("RankFailedError", ODD)
            assert reason in outcome.error[3]


def hanging(ranks: Ranks) -> None:
    """One rank hangs in something that others wait long for, such as reading weights from a dead disk."""
    if ranks.rank == ODD:
        with ranks.busy("loading"):
            block()
    ranks.control.all_gather_object("loaded")


@pytest.mark.timeout(120)
def test_long_work_has_an_end() -> None:
    outcomes = watch_ranks(WORLD, hanging, timeout=2.0, busy=4.0)
    check(outcomes, "loading", "busy_timeout is 4 s")
    assert outcomes[ODD].code == 3 and outcomes[ODD].error is not None  # its own watch ends it, too
    assert outcomes[ODD].error[:3] == ("RankFailedError", ODD, "loading")


def decoding(ranks: Ranks) -> str:
    """One rank works for long, and gets on; the others have nothing to do but wait."""
    if ranks.is_leader:
        with ranks.busy("decoding"):
            for _ in range(4):
                time.sleep(1.0)
                ranks.at("decoding", busy=True)
    ranks.control.all_gather_object("decoded")
    return ranks.where


@pytest.mark.timeout(120)
def test_long_work_that_gets_on_is_waited_for() -> None:
    """For longer than the timeout, and longer than any single thing may take."""
    outcomes = watch_ranks(2, decoding, timeout=1.5, busy=3.0)
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
    assert outcomes[0].result == "start"  # what it was at before


def twice(ranks: Ranks, folder: Path) -> list[str]:
    """A group has nothing to do before its first job, after one that ends well and after one refused."""
    engine, places = Engine(load_config("wan-tiny"), ranks), []
    request = engine.config.request("a red circle", **SMALL, steps=1)
    for name, refused in (("a", False), ("a", True), ("b", False)):  # the second would replace a file
        places.append(ranks.where)
        time.sleep(1.5 * BUSY)
        job = job_of(engine, request, Outputs.named(folder / f"{name}.mp4"))
        with pytest.raises(BadRequestError) if refused else nullcontext():
            do_job(engine, job)
    return places


@pytest.mark.timeout(120)
def test_a_group_may_have_nothing_to_do_for_longer_than_anything_may_take(tmp_path: Path) -> None:
    assert run_ranks(2, twice, tmp_path, busy=BUSY) == [["idle"] * 3] * 2
    assert {path.name for path in tmp_path.glob("*.mp4")} == {"a.mp4", "b.mp4"}


def decode_oddly(ranks: Ranks, decoding: str, odd: Callable[[], None]) -> float:
    """The second rank does something else before it decodes its part of a frame."""
    changes = {"decode": decoding, "tiles": Tiles(size=32, stride=24)}
    config = load_config("wan-tiny").model_copy(update=changes)
    decode = _CausalDecoder.decode

    def slowly(decoder: _CausalDecoder, hidden_BCFHW: torch.Tensor) -> torch.Tensor:
        if ranks.rank == ODD:
            odd()
        return decode(decoder, hidden_BCFHW)

    _CausalDecoder.decode = slowly  # type: ignore[method-assign]
    return make(ranks, config=config, steps=1, frames=5)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("decoding", ["tiles", "halo"])
def test_decoding_may_take_its_time(decoding: str) -> None:
    """Longer than others are waited for."""
    outcomes = watch_ranks(2, decode_oddly, decoding, partial(time.sleep, 2.0), timeout=2.0)
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes


def die_later() -> None:
    """Die when what this rank is doing has reached the others."""
    time.sleep(1.0)
    die()


@pytest.mark.timeout(120)
def test_a_rank_that_dies_while_it_decodes_is_named() -> None:
    first, second = watch_ranks(2, decode_oddly, "halo", die_later, timeout=TIMEOUT)
    assert second.code == -signal.SIGKILL
    assert first.error is not None
    assert first.error[:3] == ("RankFailedError", ODD, "decoding") and "died" in first.error[3]


class _Device:
    """An accelerator's queue that comes to nothing more, or to everything at once."""

    def __init__(self, *, hangs: bool):
        self._hangs, self._marks = hangs, 0

    def mark(self) -> None:
        self._marks += 1

    def reached(self) -> int:
        return 0 if self._hangs else self._marks


def hung_device(ranks: Ranks) -> None:
    """All have started the same transfers and wait for their devices, as with NCCL; one of these hangs."""
    assert ranks.watch is not None
    ranks.watch.queue = _Device(hangs=ranks.rank == ODD)
    ranks.at("step 3")
    ranks.everyone.gather(torch.zeros(1), [(1,)] * WORLD)
    started = time.monotonic()
    while True:
        ranks.watch.check(time.monotonic() - started)
        time.sleep(0.01)


@pytest.mark.timeout(120)
def test_a_device_that_hangs_is_named() -> None:
    outcomes = watch_ranks(WORLD, hung_device, timeout=2.0)
    check(outcomes, "step 3", "its device makes no progress")
    assert outcomes[ODD].error is not None and outcomes[ODD].error[1] == ODD


class _BrokenDevice(_Device):
    """After a fault of a kernel, every call of CUDA fails."""

    def reached(self) -> int:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nfor debugging consider")


def broken_device(ranks: Ranks) -> None:
    assert ranks.watch is not None
    ranks.control.all_gather_object("all are here")
    ranks.at("step 3")
    if ranks.rank == ODD:
        ranks.watch.queue = _BrokenDevice(hangs=True)
        ranks.watch.at("step 3")
        block()
    ranks.control.all_gather_object("step 3 is done")


@pytest.mark.timeout(120)
def test_a_device_that_has_failed_is_named() -> None:
    outcomes = watch_ranks(WORLD, broken_device, timeout=3.0)
    for outcome in outcomes:
        assert outcome.code == 3 and outcome.error is not None
        assert outcome.error[:3] == ("RankFailedError", ODD, "step 3"), outcome.error
    assert "its device failed: CUDA error: an illegal memory access" in outcomes[ODD].error[3]
