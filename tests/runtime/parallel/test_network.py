"""The interface that ranks use between machines, and the variables that name it."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.errors import BadRequestError
from runtime.parallel import network
from runtime.parallel.network import CARDS, GLOO, NCCL, Place

CARDS_OF_ONE = {
    "lo": ["127.0.0.1", "::1"], "eth0": ["192.0.2.7"], "eth1": ["10.0.0.7", "fe80::7"], "ib0": [],
}  # fmt: skip


@pytest.fixture(autouse=True)
def variables(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """None of them is set, and what a test sets is not left."""
    for name in network.network_settings():
        monkeypatch.delenv(name)
    yield
    for name in network.network_settings():
        del os.environ[name]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """One with these interfaces."""
    monkeypatch.setattr(network, "_interfaces", lambda: CARDS_OF_ONE)


def test_interfaces_are_those_of_this_machine() -> None:
    assert "127.0.0.1" in network._interfaces()["lo"]
    assert network.source_towards("127.0.0.1") == "127.0.0.1"
    assert network.source_towards("no-such-host.invalid") == ""


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        (GLOO, "eth9", "has no interface 'eth9', but lo, eth0, eth1, ib0"),
        (GLOO, "eth0,ib0", "the interface 'ib0' of .* has no address or is down"),
        (NCCL, "bond", "no interface of .* matches it: there are lo, eth0, eth1, ib0"),
        (NCCL, "=eth", "no interface of .* matches it"),
    ],
)
def test_a_name_that_the_machine_lacks_is_refused(
    machine: None, variable: str, value: str, said: str
) -> None:
    os.environ[variable] = value
    with pytest.raises(BadRequestError, match=f"^{variable}: '{value}' given; .*{said}"):
        network.check_interfaces(nccl=True)
    if variable == NCCL:
        network.check_interfaces(nccl=False)  # which does not use it


@pytest.mark.parametrize("value", ["eth", "=eth0", "^docker,lo", "bond,eth1", "=bond0,eth1"])
def test_names_are_read_as_nccl_reads_them(machine: None, value: str) -> None:
    os.environ[NCCL] = value
    network.check_interfaces(nccl=True)


def test_cards_that_nccl_would_not_find_are_warned_of(
    machine: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It uses TCP instead, and says nothing."""
    monkeypatch.setattr(network, "_INFINIBAND", tmp_path)
    (tmp_path / "mlx5_0").mkdir()
    os.environ[CARDS] = "mlx5_0:1,mlx5_1"
    network.check_interfaces(nccl=True)
    assert not caplog.records
    os.environ[CARDS] = "=mlx5_2"
    network.check_interfaces(nccl=True)
    assert "NCCL_IB_HCA: '=mlx5_2' given; no InfiniBand card" in caplog.text and "mlx5_0" in caplog.text


def places(*addresses: str) -> list[Place]:
    """One rank on each of several machines, with these addresses towards the store."""
    return [Place(f"host-{number}:boot", address) for number, address in enumerate(addresses)]


def test_the_interface_that_reaches_the_store_is_used(machine: None) -> None:
    network.choose_interface(1, places("10.0.0.1", "10.0.0.7"), nccl=True)
    assert (os.environ[GLOO], os.environ[NCCL]) == ("eth1", "=eth1")


def test_the_machine_of_the_store_finds_the_interface_that_reaches_the_others(
    machine: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Debian, its own name means 127.0.1.1 there."""
    monkeypatch.setattr(network, "source_towards", {"10.0.0.8": "10.0.0.7"}.get)
    network.choose_interface(0, places("127.0.0.1", "10.0.0.8"), nccl=False)
    assert os.environ[GLOO] == "eth1" and NCCL not in os.environ


def test_what_is_set_is_kept(machine: None) -> None:
    os.environ[GLOO] = os.environ[NCCL] = "eth0"
    network.choose_interface(1, places("10.0.0.1", "10.0.0.7"), nccl=True)
    assert (os.environ[GLOO], os.environ[NCCL]) == ("eth0", "eth0")


def test_a_loopback_interface_reaches_no_other_machine(machine: None) -> None:
    os.environ[GLOO] = "lo"
    with pytest.raises(BadRequestError, match=r"'lo' given; other machines cannot reach .* set it to eth1"):
        network.choose_interface(1, places("10.0.0.1", "10.0.0.7"), nccl=False)


@pytest.mark.parametrize("addresses", [("127.0.0.1", "127.0.0.1"), ("", ""), ("10.0.0.7",)])
def test_on_one_machine_nothing_is_changed(machine: None, addresses: tuple[str, ...]) -> None:
    network.choose_interface(0, places(*addresses), nccl=True)
    assert not network.network_settings()


def test_settings_are_handed_on_and_those_of_a_machine_count_more() -> None:
    os.environ |= {NCCL: "eth0", "TORCH_NCCL_BLOCKING_WAIT": "0", "FI_PROVIDER": "efa", GLOO: "eth0"}
    told = network.network_settings()
    assert told[NCCL] == "eth0" and "PATH" not in told
    for name in told:
        del os.environ[name]
    os.environ[NCCL] = "ib0"
    network.adopt(told)
    assert (os.environ[NCCL], os.environ[GLOO], os.environ["FI_PROVIDER"]) == ("ib0", "eth0", "efa")


def test_an_address_of_a_machine_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any made-up part."""
    name = socket.gethostname()
    source = network.source_towards(name)
    assert source == "" or any(source in known for known in network._interfaces().values())
