"""RAY_ADDRESS: what names no cluster is refused at once, by its name and value."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.cluster.address import cluster_address
from runtime.errors import BadRequestError
from tests.ranks import free_port


@pytest.fixture
def listening() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize("value", [None, "", "  ", "local"])
def test_without_an_address_ray_is_ones_own(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if value is not None:
        monkeypatch.setenv("RAY_ADDRESS", value)
    assert cluster_address() is None


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("garbage", "it is not HOST:PORT"),
        ("127.0.0.1", "it is not HOST:PORT"),
        (":6379", "it is not HOST:PORT"),
        ("127.0.0.1:99999", "it is not HOST:PORT"),
        ("ray://127.0.0.1:10001", "an address with a scheme is for other Ray clients"),
        ("http://127.0.0.1:8265", "an address with a scheme is for other Ray clients"),
        ("no-such-host.invalid:6379", "nothing answers at no-such-host.invalid:6379"),
        ("auto", "no Ray is running on this machine"),
    ],
)
def test_what_is_no_address_is_refused(
    value: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", value)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with pytest.raises(BadRequestError) as refused:
        cluster_address()
    said = str(refused.value)
    assert said.startswith(f"RAY_ADDRESS: {value!r} given; {reason}")
    assert "unset RAY_ADDRESS" in said and "\n" not in said


def test_a_port_at_which_nothing_listens_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(BadRequestError, match=f"nothing answers at {address} .Connection refused"):
        cluster_address()


def test_the_cluster_of_this_machine_is_found(
    listening: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{listening}")
    assert cluster_address() == f"127.0.0.1:{listening}"
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(f"127.0.0.1:{listening}\n")
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert cluster_address() == f"127.0.0.1:{listening}"
