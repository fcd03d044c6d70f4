"""Many ranks from the command line: one video, one exit code, and no process left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from launch import cli
from launch.cli import without_launcher
from launch.commands import torchrun
from launch.shell import rank
from runtime.request.config import shipped
from tests.forked import Command, completed
from tests.ranks import free_port

PROMPT = "a red circle moving left on a black background"
SIZE = ["--size", "64x48", "--frames", "5", "--max-sequence-length", "32"]
SMALL = [*SIZE, "--steps", "6", "--spectrum", "paper"]
GENERATE = ["generate", PROMPT, "--timeout", "10"]
TORCHRUN = "torch.distributed.run"

pytestmark = pytest.mark.timeout(120)


def report_of(path: Path) -> dict[str, object]:
    return dict(json.loads(path.with_suffix(".json").read_text()))


def test_two_ranks_make_the_video_of_one(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """And whoever has been told where it is, is not told of a signal after that."""
    one, two = tmp_path / "one.mp4", tmp_path / "two.mp4"
    assert cli.run(["generate", PROMPT, *SMALL, "--out", str(one)]) == 0
    capfd.readouterr()
    command = [*GENERATE, *SMALL, "--ranks", "2", "--launcher=torchrun", "--out", str(two)]
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    own = os.environ | {"TMPDIR": str(temporary)}
    pipe = subprocess.PIPE
    with Command(command, stdout=pipe, stderr=pipe, env=own) as process:
        assert process.stdout is not None
        told = process.stdout.readline()
        process.send_signal(signal.SIGINT)  # the ranks are about to end
        rest, said = process.communicate()
    assert process.returncode == 0, said
    assert list(temporary.iterdir()) == []
    assert told + rest == f"{two}\n"  # of two ranks, one speaks
    assert said.count("step 6/6") == 1
    assert "cancelled" not in said
    alone, both = report_of(one), report_of(two)
    assert both["frames_sha256"] == alone["frames_sha256"]
    assert both["topology"] == {"world": 2, "cfg": 2, "ring": 1, "ulysses": 1}
    assert both["decision_digest"] == alone["decision_digest"] * 2  # type: ignore[operator]
    tokens, patch = 2 * 3 * 4, 4 * 16 * 4
    assert both["collective_bytes"] == {
        "computed_step": 2 * tokens * patch,
        "forecast_step": 2 * tokens * patch,
    }


def test_two_nodes_make_one_video(tmp_path: Path) -> None:
    """Two agents, as on two machines; the second knows only where the first is."""
    out, port = tmp_path / "a.mp4", free_port()
    job = ["-m", "launch.torchrun", PROMPT, *SMALL, "--out", str(out), "--compare", "--overwrite"]
    meeting = [
        "--nnodes",
        "2",
        "--nproc-per-node",
        "1",
        "--master-addr",
        "127.0.0.1",
        f"--master-port={port}",
    ]
    nodes = [
        Command(
            [*meeting, "--node-rank", str(number), *job, "--ulysses", "2", "--cfg", "1"],
            TORCHRUN,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for number in range(2)
    ]
    said = [node.communicate() for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert [stdout for stdout, _ in said] == [f"{out}\n", ""]
    report = report_of(out)
    assert report["topology"] == {"world": 2, "cfg": 1, "ring": 1, "ulysses": 2}
    assert report["quality"] is not None


def test_a_node_without_the_config_says_so_and_the_others_end(tmp_path: Path) -> None:
    """Two agents again; the second node was not given the config, and its rank never comes to the others."""
    port, config = free_port(), tmp_path / "mine.yaml"
    config.write_text(shipped("wan-tiny.yaml").read_text())
    meeting = ["--nnodes=2", "--nproc-per-node=1", "--master-addr=localhost", f"--master-port={port}"]
    job = ["-m", "launch.torchrun", PROMPT, *SMALL, "--out", str(tmp_path / "a.mp4"), "--timeout", "60"]
    started = time.monotonic()
    nodes = [
        Command(
            [*meeting, "--node-rank", str(number), *job, "--config", str(tmp_path / name)],
            TORCHRUN,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for number, name in enumerate(["mine.yaml", "missing.yaml"])
    ]
    first, second = (node.communicate()[1] for node in nodes)
    assert time.monotonic() - started < 55  # long before the timeout
    assert f"lockstep: config: '{tmp_path / 'missing.yaml'}' given; " in second
    assert "lockstep: rank 1 refuses: config: " in first
    for node, said in zip(nodes, (first, second), strict=True):
        assert node.returncode == 1 and "exitcode  : 2" in said  # torchrun's own code, and that of the rank


def test_a_rank_that_is_alone_ends_in_time(tmp_path: Path) -> None:
    environment = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost"}
    own = {name: str(value) for name, value in environment.items()} | {"MASTER_PORT": str(free_port())}
    words = [PROMPT, *SMALL, "--timeout", "3", "--out", str(tmp_path / "a.mp4")]
    done = completed(words, "launch.torchrun", env=os.environ | own)
    assert done.returncode == 3
    assert (
        "lockstep: rank 1 failed at the meeting of the ranks: it did not arrive at localhost:" in done.stderr
    )
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("nodes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_what_ends_the_first_rank_is_said_once(tmp_path: Path, nodes: int) -> None:
    """It cannot write its files: they may have 8 KiB each. The first rank of another node says so there."""
    out = tmp_path / "a.mp4"
    if nodes == 1:
        module, starts = "launch", [[*GENERATE, "--ranks", "2", "--launcher", "torchrun"]]
    else:
        meeting = ["--nnodes=2", "--nproc-per-node=1", "--master-addr=localhost"]
        meeting.append(f"--master-port={free_port()}")
        job = ["-m", "launch.torchrun", PROMPT, "--timeout", "10"]
        module, starts = TORCHRUN, [[*meeting, f"--node-rank={number}", *job] for number in range(2)]
    words, pipe = [*SMALL, "--checkpoint-every", "0", "--out", str(out)], subprocess.PIPE
    agents = [Command([*start, *words], module, stdout=pipe, stderr=pipe) for start in starts]
    for agent in agents:  # they have started no ranks yet
        psutil.Process(agent.pid).rlimit(psutil.RLIMIT_FSIZE, (8192, 8192))
    ended = [agent.communicate() for agent in agents]
    for agent, (printed, said) in zip(agents, ended, strict=True):
        assert agent.returncode == (3 if nodes == 1 else 1), said  # torchrun has a code of its own
        assert printed == ""
        why = [line for line in said.splitlines() if line.startswith("lockstep: ")]
        assert sum("File too large" in line for line in why) == 1, said


@contextmanager
def running(out: Path, *options: str) -> Iterator[Command]:
    """A video on two ranks that is being denoised; whatever is left of it at the end is killed."""
    command = [*GENERATE, "--ranks", "2", "--launcher", "torchrun", "--out", str(out), *options]
    with Command(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                if "step 5/50" in line:
                    break
            yield process
        finally:
            for left in (*ranks_of(process), process):
                left.kill()  # type: ignore[attr-defined]


def ranks_of(process: Command) -> list[psutil.Process]:
    """The rank processes, by rank."""
    try:
        children = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    ranks = [child for child in children if "launch.torchrun" in " ".join(child.cmdline())]
    return sorted(ranks, key=lambda child: child.pid)  # they were forked in this order


def assert_gone(processes: list[psutil.Process], within: float = 20.0) -> None:
    gone, alive = psutil.wait_procs(processes, timeout=within)
    assert not alive, alive
    assert len(gone) == len(processes)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "victim"), [(signal.SIGKILL, 0), (signal.SIGSTOP, 1)])
def test_a_rank_that_dies_or_stops_ends_the_job(tmp_path: Path, number: signal.Signals, victim: int) -> None:
    with running(tmp_path / "a.mp4", "--compare") as process:
        ranks = ranks_of(process)
        ranks[victim].send_signal(number)
        stdout, stderr = process.communicate()
        assert process.returncode == 3
        assert_gone(ranks)
    assert stdout == ""
    assert stderr.count(f"lockstep: rank {victim} failed at step") == 1
    assert stderr.count("lockstep: ") == 2  # and what can be done now
    left = {path.name for path in tmp_path.iterdir()}
    if number == signal.SIGKILL:  # what the killed one was writing is swept by the next who writes there
        left = {name for name in left if ".part." not in name}
    assert left <= {"a.checkpoints"}


@pytest.mark.slow
def test_a_signal_cancels_all_ranks(tmp_path: Path) -> None:
    with running(tmp_path / "a.mp4", "--compare") as process:
        ranks = ranks_of(process)
        process.terminate()
        _, stderr = process.communicate()
        assert process.returncode == 130
        assert_gone(ranks)
    assert "cancelled" in stderr and "Traceback" not in stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.checkpoints"]


@pytest.mark.slow
def test_a_signal_to_one_rank_cancels_all_at_one_step(tmp_path: Path) -> None:
    with running(tmp_path / "a.mp4", "--compare") as process:
        ranks = ranks_of(process)
        ranks[1].terminate()
        _, stderr = process.communicate()
        assert process.returncode == 130
        assert_gone(ranks)
    assert "cancelled (stopped after step" in stderr


def test_a_rank_that_is_killed_before_it_meets_the_others_is_named(tmp_path: Path) -> None:
    """Nobody but the agent knows of it."""
    command = [*GENERATE, *SMALL, "--ranks", "2", "--launcher", "torchrun", "--out", str(tmp_path / "a.mp4")]
    with Command(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as agent:
        ranks: list[psutil.Process] = []
        while not ranks:
            assert agent.poll() is None
            time.sleep(0.01)
            ranks = ranks_of(agent)
        ranks[0].kill()
        printed, said = agent.communicate(timeout=100)
    assert (agent.returncode, printed) == (3, "")
    assert "lockstep: rank 0 was ended by SIGKILL" in said
    assert "lockstep: there is no checkpoint: the same command starts again at the first step" in said
    assert "Traceback" not in said
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_ranks_do_not_outlive_what_started_them(tmp_path: Path) -> None:
    with running(tmp_path / "a.mp4", "--compare") as process:
        ranks = ranks_of(process)
        assert len(ranks) == 2
        process.kill()
        assert_gone(ranks)
    assert list(tmp_path.glob("*.mp4")) == []


@pytest.mark.slow
def test_a_request_that_only_the_model_can_refuse_exits_2(tmp_path: Path) -> None:
    out = tmp_path / "a.mp4"
    options = ["--size", "64x48", "--frames", "5", "--steps", "2", "--ranks", "2"]
    options += ["--attention", "cudnn", "--launcher", "torchrun"]
    done = completed(["--verbose", *GENERATE, *options, "--out", str(out)])
    assert done.returncode == 2
    assert "attention: 'cudnn' given; it runs on cuda only" in done.stderr
    assert "rank 1 launch: ending: " in " ".join(done.stderr.split())  # which only --verbose shows
    assert not out.exists()


def as_a_rank(*arguments: str) -> int:
    """The exit code of a rank that torchrun would have started."""
    return rank.run(list(arguments), torchrun.rank, "launch.torchrun")


def test_torchrun_with_another_number_of_ranks_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    started = {
        "RANK": 0,
        "LOCAL_RANK": 0,
        "WORLD_SIZE": 1,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
    }
    for name, value in started.items():
        monkeypatch.setenv(name, str(value))
    assert as_a_rank(PROMPT, "--ranks", "2", "--out", str(tmp_path / "a.mp4")) == 2
    assert "ranks: 2 given; torchrun started 1" in capfd.readouterr().err


def test_an_option_is_shown_and_not_obeyed_by_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    assert as_a_rank(PROMPT, "--\x1b]0;title") == 2
    said = capfd.readouterr().err
    assert "No such option" in said and "\\x1b]0;title" in said and "\x1b" not in said


@pytest.mark.parametrize(("name", "value"), [("RANK", "x"), ("RANK", "5"), ("MASTER_PORT", "abc")])
def test_a_variable_that_means_nothing_is_a_bad_request(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    given = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "::1", "MASTER_PORT": "29500"}
    for other, usual in {**given, name: value}.items():
        monkeypatch.setenv(other, usual)
    assert as_a_rank(PROMPT) == 2
    assert f"lockstep: {name}: '{value}' given; it must be a whole number" in capfd.readouterr().err


@pytest.mark.parametrize("launcher", ["torchrun", "ray"])
def test_more_ranks_than_a_machine_can_run_are_refused(
    tmp_path: Path, launcher: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    cores = len(os.sched_getaffinity(0))
    out = str(tmp_path / "a.mp4")
    command = ["generate", PROMPT, *SMALL, "--ranks", str(8 * cores + 1), "--launcher", launcher]
    assert cli.run([*command, "--out", out]) == 2
    assert f"ranks: {8 * cores + 1} given; this machine has {cores} core" in capfd.readouterr().err


def test_a_rank_that_torchrun_did_not_start_says_so(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert as_a_rank(PROMPT) == 2
    assert "start this with torchrun" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (["a", "--launcher", "torchrun", "--seed", "1"], ["a", "--seed", "1"]),
        (["--launcher=ray", "a"], ["a"]),
        (["a"], ["a"]),
    ],
)
def test_ranks_are_not_told_of_the_launcher(given: list[str], kept: list[str]) -> None:
    assert without_launcher(given) == kept
