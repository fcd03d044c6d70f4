"""A cluster that the command did not start, of several nodes: one is lost, or something stops.

The nodes are on this machine, each with a raylet of its own; the driver's has no room for ranks.
"""

from __future__ import annotations

import contextlib
import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.cluster_utils import Cluster

from tests.commands import check_nothing_is_left, digests, environment, generate, generating, made_alone
from tests.forked import completed
from tests.ranks import free_port

pytestmark = [pytest.mark.alone, pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return made_alone(tmp_path_factory.mktemp("alone") / "a.mp4")


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head without room, and two nodes with room for two ranks each."""
    head = {"num_cpus": 0, "gcs_server_port": free_port(), "dashboard_agent_listen_port": free_port()}
    made = Cluster(initialize_head=True, head_node_args={**head, "include_dashboard": False})
    try:
        for _ in range(2):
            made.add_node(num_cpus=2)
        yield made
    finally:
        for node in (made.head_node, *made.worker_nodes):
            for name in ("gcs_server", "raylet"):
                with contextlib.suppress(psutil.Error, KeyError):
                    daemon(node, name).send_signal(signal.SIGCONT)
        made.shutdown()


def daemon(node: Any, name: str) -> psutil.Process:
    """The node's `gcs_server` or `raylet`."""
    return psutil.Process(node.all_processes[name][0].process.pid)


def title_of(process: psutil.Process) -> str:
    """What a process calls itself; nothing once it has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def ranks_on(cluster: Cluster) -> dict[Any, list[psutil.Process]]:
    """Node → the ranks that run there."""
    found: dict[Any, list[psutil.Process]] = {}
    for node in cluster.worker_nodes:
        children = [child for child in daemon(node, "raylet").children() if "RankActor" in title_of(child)]
        if children:
            found[node] = children
    return found


def resume(cluster: Cluster, out: Path, *ranks: str) -> None:
    """Do what the command advised."""
    command, given = [*generate(out, *ranks), "--resume"], environment(cluster.address)
    done = completed(command, env=given, timeout=200)
    assert (done.returncode, done.stdout) == (0, f"{out}\n"), done.stderr
    assert json.loads(out.with_suffix(".json").read_text())["resumed_at"] > 0


def check_no_rank_is_left(cluster: Cluster) -> None:
    deadline = time.monotonic() + 60
    while ranks_on(cluster) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not ranks_on(cluster)


def test_a_job_whose_node_is_lost_goes_on_with_the_others(
    cluster: Cluster, tmp_path: Path, undisturbed: list[str]
) -> None:
    out = tmp_path / "a.mp4"
    with generating(out, cluster=cluster.address) as (command, members):
        (lost,) = ranks_on(cluster)  # both ranks are on one
        cluster.remove_node(lost, allow_graceful=False)
        told, said = command.communicate(timeout=300)
    assert (command.returncode, told) == (0, f"{out}\n"), said
    assert "retrying with new ranks" in said and "Traceback" not in said
    assert digests(out) == undisturbed
    assert {path.name for path in tmp_path.iterdir()} == {"a.mp4", "a.json", "a.png"}
    check_nothing_is_left(members)
    check_no_rank_is_left(cluster)


def test_a_job_that_has_no_room_without_a_lost_node_ends_and_resumes_on_fewer_ranks(
    cluster: Cluster, tmp_path: Path
) -> None:
    out = tmp_path / "a.mp4"
    with generating(out, "--ranks", "3", "--ring", "3", cluster=cluster.address) as (command, members):
        nodes = ranks_on(cluster)
        assert len(nodes) == 2
        cluster.remove_node(next(iter(nodes)), allow_graceful=False)
        told, said = command.communicate(timeout=300)
    assert (command.returncode, told) == (3, ""), said
    assert "--resume" in said and "Traceback" not in said
    assert not out.exists()
    check_nothing_is_left(members)
    check_no_rank_is_left(cluster)
    resume(cluster, out, "--ranks", "2", "--ring", "2")


@pytest.mark.parametrize("victim", ["driver", "gcs_server"])
def test_what_stops_ends_the_command_in_time_and_nothing_is_lost(
    victim: str, cluster: Cluster, tmp_path: Path, undisturbed: list[str]
) -> None:
    """The ranks may finish the video before it is noticed; otherwise it is resumed."""
    out = tmp_path / "a.mp4"
    with generating(out, cluster=cluster.address) as (command, members):
        gcs = daemon(cluster.head_node, "gcs_server")
        stopped = gcs if victim == "gcs_server" else members[victim]
        stopped.send_signal(signal.SIGSTOP)
        told, said = command.communicate(timeout=200)
    assert "Traceback" not in said
    check_nothing_is_left(members)
    with contextlib.suppress(psutil.Error):
        stopped.send_signal(signal.SIGCONT)
    check_no_rank_is_left(cluster)
    if command.returncode != 0:
        assert (command.returncode, told) == (3, ""), said
        assert "the cluster of RAY_ADDRESS was not started by this command" in said and "--resume" in said
        resume(cluster, out)
    assert told in ("", f"{out}\n")
    assert digests(out) == undisturbed
    assert {path.name for path in tmp_path.iterdir()} == {"a.mp4", "a.json", "a.png"}


@pytest.mark.parametrize("victim", ["rank", "keeper", "raylet"])
def test_what_stops_beside_the_driver_costs_time(
    victim: str, cluster: Cluster, tmp_path: Path, undisturbed: list[str]
) -> None:
    """A stopped rank is replaced; a node whose raylet is stopped, and a keeper, keep nobody."""
    out = tmp_path / "a.mp4"
    with generating(out, cluster=cluster.address) as (command, members):
        ((node, ranks),) = ranks_on(cluster).items()
        stopped = {"rank": ranks[0], "keeper": members["keeper"], "raylet": daemon(node, "raylet")}[victim]
        stopped.send_signal(signal.SIGSTOP)
        told, said = command.communicate(timeout=300)
    assert (command.returncode, told) == (0, f"{out}\n"), said
    assert "Traceback" not in said
    assert digests(out) == undisturbed
    check_nothing_is_left(members)
    with contextlib.suppress(psutil.Error):
        stopped.send_signal(signal.SIGCONT)
    check_no_rank_is_left(cluster)


def test_a_cluster_of_another_version_is_refused_by_it(cluster: Cluster, tmp_path: Path) -> None:
    gcs, key, space = cluster.head_node.get_gcs_client(), b"CLUSTER_METADATA", b"cluster"
    content = json.loads(gcs.internal_kv_get(key, space))
    gcs.internal_kv_put(key, json.dumps({**content, "ray_version": "1.0.0"}).encode(), True, space)
    command, given = generate(tmp_path / "a.mp4"), environment(cluster.address)
    done = completed(command, env=given, timeout=200)
    assert (done.returncode, done.stdout) == (2, "")
    (said,) = (line for line in done.stderr.splitlines() if line.startswith("lockstep: "))
    assert f"RAY_ADDRESS: '{cluster.address}' given; " in said and "1.0.0" in said
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_variables_of_the_network_reach_ranks_that_others_started(cluster: Cluster, tmp_path: Path) -> None:
    """The nodes' daemons, whose children the ranks are, do not have them."""
    given = environment(cluster.address) | {"GLOO_SOCKET_IFNAME": "eth7"}
    done = completed(generate(tmp_path / "a.mp4"), env=given, timeout=200)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert "GLOO_SOCKET_IFNAME: 'eth7' given;" in done.stderr and "has no interface 'eth7'" in done.stderr
