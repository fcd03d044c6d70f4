"""How a rank judges the heartbeats of the others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace

import psutil
import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined]

from runtime.errors import BadRequestError, CancelledError, RankFailedError
from runtime.parallel.heartbeats import (
    Bounds,
    Diagnosis,
    Heartbeat,
    RankState,
    Still,
    Wait,
    diagnose,
    ending,
    host_name,
    own_heartbeat,
)
from runtime.parallel.watch import Watch

PATIENCE, BUSY = 4.0, 60.0
BOUNDS = Bounds(PATIENCE, BUSY)
LONG = Still(stuck=PATIENCE)
OWN_BORN = psutil.Process().create_time()
OWN = Heartbeat("here", 1, 0.0, where="step 7", entered=20)
FINE = Heartbeat("there", 2, 0.0, where="step 7", entered=20)


def diagnosis(
    *others: Heartbeat, wait: Wait | None = None, still: dict[int, Still] | None = None
) -> Diagnosis | None:
    heartbeats = dict(enumerate([OWN, *others]))
    return diagnose(0, OWN, wait or Wait(), heartbeats, still or {}, BOUNDS)


def test_all_is_well() -> None:
    assert diagnosis(FINE, FINE, wait=Wait(PATIENCE)) is None


def test_silence_is_a_failure_only_when_it_lasts() -> None:
    assert diagnosis(FINE, still={1: Still(3.9)}) is None
    assert diagnosis(FINE, still={1: Still(4.1)}) == Diagnosis(
        1,
        "step 7",
        "it has shown no sign of life for 4.1 s: there is down, or the network to it is cut",
        silent=True,
        host="there",
    )
    assert diagnosis(replace(FINE, state=RankState.DONE), still={1: Still(99.0)}) is None


def test_a_lost_machine_is_told_from_a_silent_rank() -> None:
    """Only when no rank of it gives a sign of life; a rank of one's own machine is looked at directly."""
    lost = diagnosis(FINE, FINE, still={1: Still(4.1), 2: Still(3.9)})
    assert lost is not None
    assert "nor has any of 2 ranks there: there is down, or the network to it is cut" in lost.reason
    assert str(lost.error()).startswith("rank 1 on there failed at step 7: it has shown no sign of life")
    alone = diagnosis(FINE, FINE, still={1: Still(4.1), 2: Still(0.5)})
    assert alone is not None and alone.reason == "it has shown no sign of life for 4.1 s"
    near = diagnosis(replace(FINE, host="here", pid=os.getpid(), born=OWN_BORN), still={1: Still(4.1)})
    assert near is not None and (near.reason, near.host) == ("it has shown no sign of life for 4.1 s", "")


def test_data_that_does_not_pass_is_told_although_the_store_answers() -> None:
    """All have started the same transfers and none gets further; but work and a late rank are waited for."""
    bounds, long = BOUNDS._replace(transfer=PATIENCE), {0: LONG, 1: LONG}

    def found(other: Heartbeat, still: dict[int, Still], waited: float = PATIENCE) -> Diagnosis | None:
        return diagnose(0, OWN, Wait(waited), {0: OWN, 1: other}, still, bounds)

    stuck = found(FINE, long)
    assert stuck is not None and stuck.rank is None
    assert "the data does not pass between here, there" in stuck.reason
    assert diagnose(0, OWN, Wait(PATIENCE), {0: OWN, 1: FINE}, long, BOUNDS) is None  # no limit
    assert found(FINE, long, waited=3.9) is None
    assert found(FINE, long | {1: Still(stuck=3.9)}) is None
    assert found(replace(FINE, busy=True), long) is None
    late = found(replace(FINE, entered=19), long)
    assert late is not None and late.rank == 1


def test_a_rank_that_refuses_is_no_failure_of_the_others() -> None:
    """Its reason and its exit code reach everyone."""
    told = ending(BadRequestError("model: 'x' given; no such folder"), 1)
    found = diagnosis(replace(FINE, **told), FINE)
    assert found is not None
    error = found.error()
    assert isinstance(error, BadRequestError)
    assert str(error) == "rank 1 on there refuses: model: 'x' given; no such folder"
    lost = ending(OSError(5, "Input/output error", "weights"), 1)
    assert lost["reason"] == "OSError: 'weights': Input/output error" and not lost.get("refuses")


class _Cut(HashStore):
    """A store that does not answer any more once its network is cut."""

    def __init__(self) -> None:
        super().__init__()
        self.cut = threading.Event()

    def _answer(self) -> None:
        if self.cut.is_set():
            threading.Event().wait()

    def set(self, key: str, value: str) -> None:
        self._answer()
        super().set(key, value)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        self._answer()
        return super().multi_get(keys)


def test_a_store_that_does_not_answer_keeps_nobody() -> None:
    """It is told with its address and machine, and leaving does not wait for it."""
    store, own, timeout = _Cut(), own_heartbeat(), 1.0
    first = replace(own, host="there", where="step 2")
    store.set("heartbeat/0", json.dumps(asdict(first)))
    watch = Watch(store, 1, 2, timeout, place="10.0.0.1:29500")
    watch.start()
    while 0 not in watch._seen:
        time.sleep(0.01)
    store.cut.set()
    waiting = time.monotonic()
    with pytest.raises(
        RankFailedError, match=r"the ranks' store at 10.0.0.1:29500 has not answered"
    ) as caught:
        while time.monotonic() < waiting + 60:
            watch.check(0.0)
            time.sleep(0.01)
    assert (caught.value.rank, caught.value.host) == (0, "there")
    assert watch.failure() is not None
    watch.end(caught.value)  # returns


def test_whoever_is_furthest_behind_is_waited_for_in_vain() -> None:
    late, later = replace(FINE, entered=18, where="step 6"), replace(FINE, entered=17, where="step 5")
    stuck = {1: LONG, 2: LONG}
    assert diagnosis(late, later, wait=Wait(3.9), still=stuck) is None
    found = diagnosis(late, later, wait=Wait(4.0), still=stuck)
    assert found is not None and (found.rank, found.where) == (2, "step 5")
    assert "rank 0 has waited for 4.0 s at step 7" in found.reason


def test_a_rank_that_gets_further_is_waited_for() -> None:
    """It has just done something long, and comes now; this rank has waited for it all the while."""
    late = replace(FINE, entered=18)
    assert diagnosis(late, wait=Wait(99.0), still={1: Still(stuck=3.9)}) is None


def test_long_work_is_waited_for_within_its_own_bound() -> None:
    busy = replace(FINE, entered=1, busy=True, where="loading", since=59.9)
    assert diagnosis(busy, wait=Wait(99.0), still={1: Still(stuck=99.0)}) is None
    assert diagnosis(busy, wait=Wait(99.0), still={1: Still(silent=99.0)}) is not None
    found = diagnosis(replace(busy, since=60.0))  # whether anybody waits for it or not
    assert found is not None and (found.rank, found.where) == (1, "loading")
    assert found.reason == "it has been busy with this for 60 s; busy_timeout is 60 s"
    own = replace(OWN, busy=True, where="decoding", since=61.0)
    found = diagnose(0, own, Wait(), {0: own, 1: FINE}, {}, BOUNDS)
    assert found is not None and (found.rank, found.where) == (0, "decoding")


def test_a_device_that_gets_no_further_is_named() -> None:
    """With NCCL all have started the same transfers; their devices wait for the one that hangs."""
    ahead, hung = replace(FINE, reached=20), replace(FINE, reached=15, where="step 6")
    stuck = {0: LONG, 1: LONG, 2: LONG}
    own = replace(OWN, reached=20)
    heartbeats = {0: own, 1: ahead, 2: hung}
    assert diagnose(0, own, Wait(3.9), heartbeats, stuck, BOUNDS) is None
    assert diagnose(0, own, Wait(4.0), heartbeats, stuck | {2: Still(stuck=3.9)}, BOUNDS) is None
    found = diagnose(0, own, Wait(4.0), heartbeats, stuck, BOUNDS)
    assert found is not None and (found.rank, found.where) == (2, "step 6")
    assert "its device makes no progress, and rank 0 has waited for 4.0 s at step 7" in found.reason
    assert (
        diagnose(2, hung, Wait(4.0), heartbeats, stuck, BOUNDS) is not None
    )  # the one that it is says the same


def test_a_rank_that_left_is_named_once_the_transfer_breaks() -> None:
    left = replace(FINE, entered=3, state=RankState.DONE, where="step 2")
    assert diagnosis(left) is None
    found = diagnosis(left, wait=Wait(0.1, broken=True))
    assert found is not None and (found.rank, found.where) == (1, "step 2")


def test_the_cause_is_named_not_the_messenger() -> None:
    messenger = replace(FINE, state=RankState.FAILED, blames=2, reason="boom")
    cause = replace(FINE, state=RankState.FAILED, blames=2, reason="boom", where="step 3")
    assert diagnosis(messenger, cause) == Diagnosis(2, "step 3", "boom", host="there")
    explained = diagnosis(messenger, replace(cause, explains=True))
    assert explained == Diagnosis(2, "step 3", "boom", told=True, host="there")
    still_there = replace(FINE, where="step 3")
    assert diagnosis(messenger, still_there) == Diagnosis(2, "step 3", "boom", host="there")


def test_a_failure_outweighs_the_cancellation_that_follows_it() -> None:
    cancelled = replace(FINE, state=RankState.CANCELLED, reason="interrupted")
    failed = replace(FINE, state=RankState.FAILED, blames=2, reason="boom")
    found = diagnosis(cancelled, failed)
    assert found is not None and isinstance(found.error(), RankFailedError)
    found = diagnosis(cancelled, FINE)
    assert found is not None and isinstance(found.error(), CancelledError)


@pytest.mark.parametrize("reaped", [False, True])
def test_a_dead_process_on_this_host_is_seen_at_once(reaped: bool) -> None:
    own = Heartbeat(host_name(), os.getpid(), psutil.Process().create_time())
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    heartbeat = Heartbeat(own.host, child.pid, psutil.Process(child.pid).create_time(), where="step 4")
    assert diagnose(0, own, Wait(), {0: own, 1: heartbeat}, {}, BOUNDS) is None
    child.kill()
    if reaped:
        child.wait()
    else:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, but still a zombie
    found = diagnose(0, own, Wait(), {0: own, 1: heartbeat}, {}, BOUNDS)
    assert found == Diagnosis(1, "step 4", f"its process {child.pid} died")
    child.wait()
    assert child.stdin is not None
    child.stdin.close()


def test_a_rank_that_tells_the_cause_and_ends_while_it_is_judged_is_not_the_cause() -> None:
    """Its heartbeat was read before it told, and its process looked for when it was gone."""
    store, own = HashStore(), own_heartbeat()
    watch = Watch(store, 0, 3, timeout=5.0)
    child = subprocess.Popen([sys.executable, "-c", ""])
    before = replace(own, pid=child.pid, born=psutil.Process(child.pid).create_time(), where="step 3")
    child.wait()
    cause = replace(own, host="there", where="step 2")
    told = replace(before, state=RankState.FAILED, blames=1, reason="it has not arrived")
    for rank, heartbeat in enumerate((own, cause, told)):
        store.set(f"heartbeat/{rank}", json.dumps(asdict(heartbeat)))
    watch._notice({0: own, 1: cause, 2: before})
    found = watch.failure()
    assert isinstance(found, RankFailedError) and (found.rank, found.where) == (1, "step 2")


class _Hesitant(HashStore):
    """A store into which the watch's thread, once told to hesitate, writes half a second late."""

    def __init__(self) -> None:
        super().__init__()
        self.hesitates, self.late = False, threading.Event()

    def set(self, key: str, value: str) -> None:
        if self.hesitates and threading.current_thread().name == "lockstep-watch":
            self.late.set()
            time.sleep(0.5)
        super().set(key, value)


class _OneAtATime:
    """A device's queue that takes a while to say how far it is, and must not be asked meanwhile."""

    def __init__(self) -> None:
        self._asked, self.begun, self.twice = threading.Lock(), threading.Event(), False

    def mark(self) -> None: ...

    def reached(self) -> int:
        if not self._asked.acquire(blocking=False):
            self.twice = True
            return 0
        self.begun.set()
        time.sleep(0.5)
        self._asked.release()
        return 0


def test_a_device_is_asked_by_one_thread_at_a_time() -> None:
    watch, queue = Watch(HashStore(), 0, 1, timeout=5.0), _OneAtATime()
    watch.start()
    watch.queue = queue
    watch.at("idle")  # the thread tells it
    assert queue.begun.wait(10)
    watch.end()
    assert not queue.twice


def test_how_a_rank_ended_is_not_replaced_by_an_older_heartbeat() -> None:
    """Another rank would take the end of the process for its death, and a cancelled job for a failed one."""
    store = _Hesitant()
    watch = Watch(store, 0, 1, timeout=5.0)
    watch.start()
    store.hesitates = True
    watch.at("idle")  # the thread tells it
    assert store.late.wait(10)
    watch.end(CancelledError("stopped after step 6"))
    assert json.loads(store.get("heartbeat/0"))["state"] == RankState.CANCELLED
