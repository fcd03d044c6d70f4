"""One video on two hosts under torchrun: interfaces, disks of their own; a slow, filtered or cut link.

The hosts are network namespaces: see `tests.hosts`. What NCCL does between machines is not tested.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from runtime.request.config import EMBEDDED_MODELS, shipped
from tests.forked import Command, completed
from tests.hosts import Host, hosts, why_not

pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.skipif(bool(why_not()), reason=why_not() or "hosts can be made"),
]

PROMPT = "a red circle moving left on a black background"
STEPS = 12
SIZE = ["--size", "64x48", "--frames", "5", "--max-sequence-length", "32", "--steps", str(STEPS)]
PORT = 29500
TIMEOUT = 8  # seconds
SLACK = 25.0  # seconds that a busy machine and torchrun's agent may add


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    with hosts(tmp_path) as (first, second):
        yield first, second


def start(
    hosts: Sequence[Host], *options: str, ranks: int = 2, rank: Sequence[str] = (), **variables: str
) -> list[Command]:
    """One agent on each host; the first host's is the first.

    Args:
        ranks: number on each host.
        rank: command that torchrun runs; by default `launch.torchrun`.
    """
    meeting = [f"--nnodes={len(hosts)}", f"--nproc-per-node={ranks}", f"--master-addr={hosts[0].address}"]
    job = rank or ["-m", "launch.torchrun", PROMPT, *SIZE, "--timeout", str(TIMEOUT)]
    job = [*job, "--checkpoint-every", "1", "--out", str(hosts[0].mount / "a.mp4"), *options]
    return [
        host.start(
            [*meeting, f"--master-port={PORT}", f"--node-rank={number}", *job],
            "torch.distributed.run",
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | variables,
        )
        for number, host in enumerate(hosts)
    ]


def reach(agent: Command, step: int) -> None:
    """Wait until the first host's ranks have done a step."""
    assert agent.stderr is not None
    said = []
    for line in agent.stderr:
        said.append(line)
        if f"step {step}/" in line:
            return
    raise AssertionError("".join(said))


def ends(agents: Sequence[Command]) -> list[tuple[int, str, str]]:
    """Exit code, stdout and what Lockstep and torchrun said, of each host."""
    found = []
    for agent in agents:
        printed, said = agent.communicate(timeout=150)
        found.append((int(agent.returncode), printed, said))
    return found


def succeeded(agents: Sequence[Command], out: Path) -> None:
    found = ends(agents)
    assert [code for code, _, _ in found] == [0] * len(agents), found
    assert [printed for _, printed, _ in found] == [f"{out}\n", *[""] * (len(agents) - 1)]


def report_on(host: Host) -> dict[str, Any]:
    return dict(json.loads((host.disk / "a.json").read_text()))


def files(host: Host) -> set[str]:
    return {path.name for path in host.disk.iterdir()}


def explained(said: str) -> list[str]:
    return [line.removeprefix("lockstep: ") for line in said.splitlines() if line.startswith("lockstep: ")]


def stopped(pair: Sequence[Host], *options: str, ranks: int = 2) -> None:
    """Stop the video after a step, by a signal to the second host alone."""
    agents = start(pair, *options, ranks=ranks)
    reach(agents[0], 4)
    agents[1].send_signal(signal.SIGTERM)
    for code, printed, said in ends(agents):
        assert code != 0 and printed == "", said
    for host in pair:
        assert files(host) == {"a.checkpoints"}


@contextmanager
def ended_within(seconds: float) -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds


def test_a_video_goes_on_when_its_parts_are_on_the_other_hosts_disk(
    pair: tuple[Host, Host], tmp_path: Path
) -> None:
    """No variable is set, and each host's name means its loopback address, as on Debian."""
    alone = tmp_path / "alone.mp4"
    completed(["generate", PROMPT, *SIZE, "--spectrum", "paper", "--out", str(alone)]).check_returncode()
    stopped(pair, "--spectrum", "paper", ranks=1)
    second, first = pair
    agents = start((first, second), "--spectrum", "paper", "--resume", ranks=1)
    succeeded(agents, first.mount / "a.mp4")
    report = report_on(first)
    assert report["resumed_at"] >= 4
    assert report["frames_sha256"] == json.loads(alone.with_suffix(".json").read_text())["frames_sha256"]
    assert files(first) == {"a.mp4", "a.json", "a.png"} and files(second) == set()


@pytest.mark.slow
def test_two_ranks_on_each_host_and_other_numbers_of_ranks(pair: tuple[Host, Host]) -> None:
    """Resumed on the same ranks the bits are the same; on fewer, each host reads what both have written."""
    options = ("--cfg", "1", "--ulysses", "2", "--ring", "2")
    succeeded(start(pair, *options), pair[0].mount / "a.mp4")
    whole = report_on(pair[0])
    for host in pair:
        shutil.rmtree(host.disk / "a.checkpoints", ignore_errors=True)
        for path in host.disk.iterdir():
            path.unlink()
    stopped(pair, *options)
    kept = [
        shutil.copytree(host.disk / "a.checkpoints", host.disk.parent / f"{host.name}.kept") for host in pair
    ]
    succeeded(start(pair, *options, "--resume"), pair[0].mount / "a.mp4")
    same = report_on(pair[0])
    assert same["resumed_at"] >= 4
    for name in ("frames_sha256", "decision_digest", "computed", "collective_bytes"):
        assert same[name] == whole[name]
    for host, copy in zip(pair, kept, strict=True):
        shutil.copytree(copy, host.disk / "a.checkpoints")
    fewer = start(pair, "--cfg", "1", "--ulysses", "2", "--resume", "--overwrite", ranks=1)
    succeeded(fewer, pair[0].mount / "a.mp4")
    assert report_on(pair[0])["resumed_at"] == same["resumed_at"]
    assert report_on(pair[0])["decision_digest"][0] == whole["decision_digest"][0]


@pytest.mark.slow
def test_a_host_that_has_lost_its_disk_is_named_on_both(pair: tuple[Host, Host]) -> None:
    """Nothing is begun; with --overwrite it starts again."""
    stopped(pair, ranks=1)
    shutil.rmtree(pair[1].disk / "a.checkpoints")
    for code, printed, said in ends(start(pair, "--resume", ranks=1)):
        assert code == 1 and "exitcode  : 2" in said and printed == ""
        (line,) = [line for line in explained(said) if "resume: " in line]
        assert "-1.json' and its parts were written on host-b, which does not have it any more" in line
        assert "--overwrite" in line
    assert files(pair[0]) == {"a.checkpoints"}
    succeeded(start(pair, "--overwrite", ranks=1), pair[0].mount / "a.mp4")
    assert report_on(pair[0])["resumed_at"] == 0


@pytest.mark.slow
def test_a_link_that_is_cut_ends_both_hosts_in_time_and_nothing_is_lost(pair: tuple[Host, Host]) -> None:
    """Each names the other; what torchrun adds is bounded as well."""
    agents = start(pair)
    reach(agents[0], 4)
    pair[1].link("down")
    with ended_within(3 * TIMEOUT + SLACK):
        (_, _, first), (_, _, second) = ends(agents)
    lost = "is down, or the network to it is cut"
    assert any(
        "rank 2 on host-b failed at step" in line or "rank 3 on host-b" in line for line in explained(first)
    )
    assert any(f"host-b {lost}" in line for line in explained(first)), first
    assert any(
        line.startswith("rank 0 on host-a failed at step") and f"host-a {lost}" in line
        for line in explained(second)
    ), second
    for said in (first, second):
        assert said.count("exitcode  : 3") == 2
        assert "the same command with --resume resumes from the last checkpoint" in said
    pair[1].link("up")
    succeeded(start(pair, "--resume"), pair[0].mount / "a.mp4")
    assert report_on(pair[0])["resumed_at"] >= 2


@pytest.mark.slow
def test_a_short_cut_and_a_slow_link_change_nothing(pair: tuple[Host, Host], tmp_path: Path) -> None:
    """Two megabits per second, and three seconds without any; cfg is exact on two ranks."""
    alone = tmp_path / "alone.mp4"
    completed(["generate", PROMPT, *SIZE, "--out", str(alone)]).check_returncode()
    for host in pair:
        host.traffic("qdisc", "add", "root", "tbf", "rate", "2mbit", "burst", "16kb", "latency", "400ms")
    agents = start(pair, "--cfg", "2", ranks=1)
    reach(agents[0], 3)
    pair[1].link("down")
    time.sleep(3)  # shorter than the ranks' patience: what was sent meanwhile is sent again
    pair[1].link("up")
    succeeded(agents, pair[0].mount / "a.mp4")
    assert (
        report_on(pair[0])["frames_sha256"]
        == json.loads(alone.with_suffix(".json").read_text())["frames_sha256"]
    )


@pytest.mark.slow
def test_a_firewall_between_the_hosts_is_told_from_a_lost_host(pair: tuple[Host, Host]) -> None:
    """The store's port is open, the others are not; what is dropped is not answered."""
    card = ("iif", "net0", "ipproto", "tcp")
    pair[1].ip("rule", "add", "pref", "10", *card, "sport", str(PORT), "lookup", "local")
    pair[1].ip("rule", "add", "pref", "20", *card, "dport", "1024-65534", "blackhole")
    pair[1].ip("rule", "add", "pref", "30", "lookup", "local")
    pair[1].ip("rule", "del", "pref", "0")
    with ended_within(3 * TIMEOUT + SLACK + 30):
        found = ends(start(pair, ranks=1))
    for _, _, said in found:
        assert "exitcode  : 3" in said
        (why,) = [line for line in explained(said) if "failed at" in line]
        assert "data does not pass between host-a, host-b" in why and "firewall" in why, said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("eth7", "has no interface 'eth7', but lo, net0"),
        ("lo", "other machines cannot reach that interface; unset it, or set it to net0"),
    ],
)
def test_an_interface_that_cannot_be_used_is_refused_on_both(
    pair: tuple[Host, Host], value: str, why: str
) -> None:
    for code, _, said in ends(start(pair, ranks=1, GLOO_SOCKET_IFNAME=value)):
        assert code == 1 and "exitcode  : 2" in said, said
        assert any(
            f"GLOO_SOCKET_IFNAME: '{value}' given;" in line and why in line for line in explained(said)
        )


@pytest.mark.slow
def test_what_one_host_cannot_read_is_refused_by_all_ranks(pair: tuple[Host, Host]) -> None:
    """With the same exit code and reason everywhere, although only its own ranks have noticed."""
    model = pair[0].mount / "model"
    for host in pair:
        text = shipped("wan-tiny.yaml").read_text().replace("model: wan-tiny", f"model: {model}")
        (host.disk / "mine.yaml").write_text(text)
        shutil.copytree(EMBEDDED_MODELS / "wan-tiny", host.disk / "model")
    shutil.rmtree(pair[1].disk / "model" / "transformer")
    for host, (code, _, said) in zip(
        pair, ends(start(pair, "--config", str(pair[0].mount / "mine.yaml"))), strict=True
    ):
        assert code == 1 and said.count("exitcode  : 2") == 2, said
        (why,) = [line for line in explained(said) if str(model) in line]
        assert ("on host-b refuses: " in why) == (host is pair[0]), said


@pytest.mark.slow
def test_a_nameserver_that_does_not_answer_costs_time_alone(pair: tuple[Host, Host]) -> None:
    """Torch looks up the name of each machine to which it connects. No agent holds the store here."""
    for host, other in zip(pair, reversed(pair), strict=True):
        host.ip("route", "add", "default", "via", other.address)  # which answers nothing
    words = [PROMPT, *SIZE, "--timeout", "60", "--out", str(pair[0].mount / "a.mp4")]
    ranks = []
    for number, host in enumerate(pair):
        variables = {"RANK": f"{number}", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
        variables |= {"MASTER_ADDR": pair[0].address, "MASTER_PORT": str(PORT)}
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        ranks.append(host.start(words, "launch.torchrun", env=os.environ | variables, **streams))
    succeeded(ranks, pair[0].mount / "a.mp4")


@pytest.mark.slow
def test_a_master_that_cannot_be_reached_is_named_with_what_to_set(pair: tuple[Host, Host]) -> None:
    """Its address is nobody's. With torchrun, its agent notices first, in a time that it can be given."""
    variables = {
        "RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "10.77.0.9",
        "MASTER_PORT": str(PORT),
    }  # fmt: skip
    words = [PROMPT, *SIZE, "--timeout", "4", "--out", str(pair[1].mount / "a.mp4")]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with ended_within(4 + SLACK):
        rank = pair[1].start(words, "launch.torchrun", env=os.environ | variables, **streams)
        _, said = rank.communicate(timeout=100)
    assert rank.returncode == 3
    assert "rank 1 found no store at 10.77.0.9:29500 within 4 s" in said
    assert "MASTER_ADDR and MASTER_PORT" in said
    meeting = ["--nnodes=2", "--nproc-per-node=1", "--node-rank=1", "--rdzv-conf", "timeout=4"]
    meeting += ["--master-addr=10.77.0.9", f"--master-port={PORT}", "-m", "launch.torchrun", PROMPT]
    with ended_within(4 + SLACK):
        agent = pair[1].start(meeting, "torch.distributed.run", **streams)
        _, said = agent.communicate(timeout=100)
    assert agent.returncode == 1 and "10.77.0.9" in said
