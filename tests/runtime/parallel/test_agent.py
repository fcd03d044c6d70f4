"""How the ranks end decides how the agent does, whatever it is told meanwhile.

Ranks are small programs here, which send the agent its signals at the moments that matter.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

from runtime.errors import BadRequestError, CancelledError, JobFailedError
from runtime.parallel import agent, signals
from runtime.parallel.agent import run_on_this_machine

_BEGIN = """
import os, signal, sys, time
from pathlib import Path

rank, folder = int(os.environ["RANK"]), Path(sys.argv[1])

def tell(number=signal.SIGINT):
    os.kill(os.getppid(), number)

def meet(where=""):
    # Both ranks are here: what they do to signals is settled.
    (folder / f"{where}{rank}").touch()
    while not (folder / f"{where}{1 - rank}").exists():
        time.sleep(0.01)
"""
_DONE = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
meet()
if rank == 0:
    tell({number})
"""
_FAILS = _DONE + "sys.exit(3)"
_CANCELLED = """
heard = []
signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
for number in range(1, {times} + 1):
    meet(str(number) + "-")
    if rank == 0:
        tell()
    while len(heard) < number:
        time.sleep(0.01)
os._exit(130)
"""
_DEAF = """
signal.signal(signal.SIGTERM, lambda *_: rank == 0 and tell())
meet()
if rank == 0:
    tell()
time.sleep(60)
"""
_UNREADY = """
if rank == 0:
    tell(signal.SIGTERM)
time.sleep(60)
"""
_LAST_IS_KILLED = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
meet()
if rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
"""
_FIRST_IS_KILLED = """
signal.signal(signal.SIGTERM, lambda *_: os._exit({code}))
meet()
if rank == 0:
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(60)
"""
_LATE = """
if rank == 1:
    sys.exit(2)
while Path(f"/proc/{{os.getppid()}}").exists() and Path(sys.argv[1], "as_a_rank.py").exists():
    children = Path(f"/proc/{{os.getppid()}}/task/{{os.getppid()}}/children").read_text().split()
    states = [Path(f"/proc/{{child}}/stat").read_text().rpartition(")")[2].split()[0] for child in children]
    if len(children) == 1 or "Z" in states:  # the other rank has ended
        break
    time.sleep(0.01)
time.sleep({seconds})
sys.exit(2)
"""
_KILLED_WHILE_LOADING = """
signal.signal(signal.SIGTERM, lambda *_: os._exit(130))
meet()
if rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(60)
"""
_ENDS_WHILE_LOADING = """
signal.signal(signal.SIGTERM, lambda *_: os._exit(130))
meet()
if rank == 1:
    sys.exit(1)
time.sleep(60)
"""
_LAST_FAILS = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
meet()
if rank == 1:
    time.sleep(0.5)
    sys.exit(3)
"""
_LAST_HEARS_NOTHING = """
signal.signal(signal.SIGTERM, signal.SIG_IGN if rank else lambda *_: os._exit(130))
(folder / f"pid-{{rank}}").write_text(str(os.getpid()))
meet()
if rank == 0:
    tell()
    time.sleep(60)
first = Path("/proc", (folder / "pid-0").read_text(), "stat")
while first.exists() and first.read_text().rpartition(")")[2].split()[0] != "Z":
    time.sleep(0.01)
tell()
time.sleep(10)
(folder / "survived").touch()
"""


@pytest.fixture(autouse=True)
def signals_are_heard() -> Iterator[None]:
    """A session that was started in the background of a shell ignores SIGINT, and the agent would, too."""
    numbers = (signal.SIGINT, signal.SIGHUP)
    before = [signal.signal(number, signal.SIG_DFL) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


Run = Callable[..., int]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a program as two ranks; signals that come one right after the other are two."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(signals, "_SAME", 0.0)

    def ranks(program: str, **values: object) -> int:
        (tmp_path / "as_a_rank.py").write_text(_BEGIN + program.format(**values))
        return run_on_this_machine(2, "as_a_rank", [str(tmp_path)])

    return ranks


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ranks_that_are_done_are_done_whatever_the_agent_is_told(run: Run, number: signal.Signals) -> None:
    assert run(_DONE, number=int(number)) == 0


def test_ranks_that_fail_have_failed_whatever_the_agent_is_told(run: Run) -> None:
    assert run(_FAILS, number=int(signal.SIGINT)) == 3


@pytest.mark.parametrize("times", [1, 2])
def test_ranks_are_told_of_every_signal(run: Run, times: int) -> None:
    assert run(_CANCELLED, times=times) == 130


def test_the_third_signal_ends_ranks_that_hear_nothing(run: Run) -> None:
    with pytest.raises(CancelledError, match="ended by SIGINT"):
        run(_DEAF)


def test_a_signal_while_ranks_are_started_ends_them_all_without_a_traceback(
    run: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(CancelledError, match="ended by SIGTERM"):
        run(_UNREADY)
    assert "Traceback" not in capfd.readouterr().err


def test_a_rank_that_is_killed_when_the_first_is_done_takes_nothing_away(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    assert run(_LAST_IS_KILLED) == 0
    assert "after the job was done, rank 1 was ended by SIGKILL" in caplog.text


def test_a_first_rank_that_is_killed_is_named_unless_the_second_has(run: Run) -> None:
    assert run(_FIRST_IS_KILLED, code=3) == 3


def test_a_first_rank_that_is_killed_is_named(run: Run) -> None:
    with pytest.raises(JobFailedError, match="rank 0 was ended by SIGKILL"):
        run(_FIRST_IS_KILLED, code=130)


def test_a_first_rank_that_still_imports_has_time_to_explain_the_refusal_of_another(run: Run) -> None:
    assert run(_LATE, seconds=1) == 2


def test_it_has_that_time_as_well_if_the_other_ends_between_two_looks(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch, which ends all ranks once it sees that one has failed, looks after the agent has."""
    look = LocalElasticAgent._monitor_workers

    def look_late(monitoring: LocalElasticAgent, group: WorkerGroup) -> RunResult:
        handlers = monitoring._pcontext.subprocess_handlers.values()  # type: ignore[union-attr]
        while all(handler.proc.poll() is None for handler in handlers):
            time.sleep(0.01)
        result: RunResult = look(monitoring, group)
        return result

    monkeypatch.setattr(LocalElasticAgent, "_monitor_workers", look_late)
    assert run(_LATE, seconds=1) == 2


def test_a_refusal_is_one_when_the_first_rank_never_comes_to_explain_it(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent, "_EXPLAINING", 0.5)
    with pytest.raises(BadRequestError, match="rank 1 refuses"):
        run(_LATE, seconds=60)


def test_a_first_rank_that_is_ended_because_another_was_killed_is_not_cancelled(run: Run) -> None:
    with pytest.raises(JobFailedError, match="rank 1 was ended by SIGKILL"):
        run(_KILLED_WHILE_LOADING)


def test_a_signal_that_is_ignored_stays_so(run: Run) -> None:
    """As nohup has it."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert run(_DONE, number=int(signal.SIGHUP)) == 0
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_rank_that_ends_while_the_first_loads_is_named(run: Run) -> None:
    with pytest.raises(JobFailedError, match="rank 1 was ended by exit code 1"):
        run(_ENDS_WHILE_LOADING)


def test_a_rank_that_fails_when_the_first_is_done_takes_nothing_away(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    assert run(_LAST_FAILS) == 0
    assert "after the job was done, rank 1 was ended by exit code 3" in caplog.text


def test_the_second_signal_ends_ranks_that_hear_nothing_once_the_first_rank_has_ended(
    run: Run, tmp_path: Path
) -> None:
    assert run(_LAST_HEARS_NOTHING) == 130
    assert not (tmp_path / "survived").exists()


def test_ranks_that_hear_nothing_are_given_up_some_time_after_the_first_has_ended(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(agent, "_EXPLAINING", 0.5)
    assert run(_LAST_HEARS_NOTHING.replace("\ntell()\ntime.sleep(10)", "\ntime.sleep(20)")) == 130
    assert not (tmp_path / "survived").exists()
