"""Ray on two hosts that share no disk: one rank on each; what is kept on one is handed on to the other.

The hosts are network namespaces: see `tests.hosts`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.forked import Command, completed
from tests.hosts import Host, hosts, why_not
from tests.jobs import PROMPT
from tests.launch.test_hosts import files, report_on

pytestmark = [
    pytest.mark.alone,
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(bool(why_not()), reason=why_not() or "hosts can be made"),
]

PORT = 6379
SIZE = ["--size", "64x48", "--frames", "5", "--max-sequence-length", "32", "--steps", "40"]
NICENESS = "RAY_worker_niceness"  # 0 in tests


def own_environment(host: Host, **more: str) -> dict[str, str]:
    """Of what runs on a host; Ray keeps its files on the host's own disk, and all have the same token."""
    clean = {name: it for name, it in os.environ.items() if not name.startswith("RAY_") or name == NICENESS}
    own = {"RAY_TMPDIR": str(host.mount / "ray"), "TMPDIR": str(host.mount / "tmp")}
    own |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(host.names.with_name("token"))}
    return clean | own | more


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Host, Host]]:
    """Two hosts, the first with a cluster's head, each with room for one rank."""
    folder = Path(tempfile.mkdtemp(prefix="ls-", dir="/tmp"))  # Ray's sockets need short names
    (folder / "token").write_text("0123456789abcdef0123456789abcdef")
    try:
        with hosts(folder) as (first, second), ExitStack() as stack:
            start_node(first, stack, "--head", f"--port={PORT}", "--include-dashboard=false")
            await_nodes(first, 1)
            start_node(second, stack, f"--address={first.address}:{PORT}")
            await_nodes(first, 2)
            yield first, second
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def start_node(host: Host, stack: ExitStack, *options: str) -> None:
    """Let a host be a node of a cluster until the stack is closed."""
    (host.disk / "tmp").mkdir()
    words = ["start", *options, f"--node-ip-address={host.address}", "--num-cpus=1", "--block"]
    log = stack.enter_context((host.disk.parent / f"{host.name}.log").open("w"))
    given = own_environment(host)
    node = host.start(
        [*words, "--disable-usage-stats"], "ray.scripts.scripts", env=given, stdout=log, stderr=log
    )
    stack.callback(end, node)


def end(node: Command) -> None:
    """End `ray start`, which ends its node."""
    node.terminate()
    try:
        node.wait(30)
    except subprocess.TimeoutExpired:
        node.kill()


def await_nodes(head: Host, number: int) -> None:
    """Wait until the cluster has so many nodes."""
    program = f"import ray; ray.init('{head.address}:{PORT}', log_to_driver=False); "
    program += "print('alive:', sum(node['Alive'] for node in ray.nodes()))"
    (head.disk / "ask.py").write_text(program)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    for _ in range(30):
        asked = head.start([], "ask", cwd=head.mount, env=own_environment(head), **streams)
        printed, said = asked.communicate(timeout=60)
        if f"alive: {number}" in printed:
            return
    raise AssertionError(said)


def generate(host: Host, head: Host, *options: str, **variables: str) -> Command:
    """Start the command on a host, on the head's cluster."""
    words = ["generate", PROMPT, *SIZE, "--spectrum", "paper", "--launcher", "ray", "--ranks", "2"]
    words += ["--cfg", "2", "--checkpoint-every", "1", "--timeout", "15"]
    words += ["--out", str(host.mount / "a.mp4"), *options]
    given = own_environment(host, RAY_ADDRESS=f"{head.address}:{PORT}", **variables)
    return host.start(words, "launch", env=given, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def stopped(host: Host, head: Host) -> str:
    """Stop the command after some steps; returns what it said."""
    command, said = generate(host, head), ""
    assert command.stderr is not None
    for line in command.stderr:
        said += line
        if "step 4/" in line:
            break
    command.send_signal(signal.SIGTERM)
    printed, rest = command.communicate(timeout=120)
    assert (command.returncode, printed) == (130, ""), said + rest
    return said


def test_a_job_that_was_stopped_goes_on_from_the_other_host(pair: tuple[Host, Host], tmp_path: Path) -> None:
    """Its first rank is where the command runs, and so are its files."""
    first, second = pair
    for host in pair:  # with a slow link between them, there are steps left when the signal has arrived
        host.traffic("qdisc", "add", "root", "tbf", "rate", "400kbit", "burst", "8kb", "latency", "1s")
    said = stopped(first, first)
    assert "0 on host-a" in said and "1 on host-b" in said
    assert "a.checkpoints" in files(first) & files(second)
    for host in pair:
        host.traffic("qdisc", "del", "root")

    again = generate(second, first, "--resume")
    printed, said = again.communicate(timeout=200)
    assert (again.returncode, printed) == (0, f"{second.mount / 'a.mp4'}\n"), said
    assert "0 on host-b" in said and "1 on host-a" in said
    resumed = report_on(second)
    assert 4 <= resumed["resumed_at"] < 40
    assert "a.checkpoints" not in files(first) | files(second)
    assert "a.mp4" in files(second) - files(first)

    alone = tmp_path / "alone.mp4"
    completed(["generate", PROMPT, *SIZE, "--spectrum", "paper", "--out", str(alone)]).check_returncode()
    assert resumed["frames_sha256"] == json.loads(alone.with_suffix(".json").read_text())["frames_sha256"]


def test_variables_of_the_network_reach_the_ranks(pair: tuple[Host, Host]) -> None:
    """Which are children of the nodes' daemons, not of the command."""
    command = generate(pair[0], pair[0], "--overwrite", GLOO_SOCKET_IFNAME="eth7")
    _, said = command.communicate(timeout=120)
    assert command.returncode == 2, said
    assert "GLOO_SOCKET_IFNAME: 'eth7' given; host-" in said and "has no interface 'eth7'" in said
