"""Reads the address of a Ray cluster from the environment."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import NoReturn

from runtime.errors import BadRequestError, reason

VARIABLE = "RAY_ADDRESS"
_PATIENCE = 5.0  # seconds for a port to answer
_PORT = 6379  # default of `ray start --head`
_CURRENT = (
    Path("ray") / "ray_current_cluster"
)  # file in Ray's temporary folder to which `ray start` writes its address


def cluster_address() -> str | None:
    """Return HOST:PORT of the cluster that RAY_ADDRESS names; None to start a local one.

    Raises:
        BadRequestError: it is not an address, or nothing answers there.
    """
    given = os.environ.get(VARIABLE, "").strip()
    if given in ("", "local"):
        return None
    address = _running() if given == "auto" else given
    if "://" in address:
        _refuse("an address with a scheme is for other Ray clients")
    host, colon, port = address.rpartition(":")
    if not (host and colon and port.isdecimal() and 0 < int(port) < 65536):
        _refuse("it is not HOST:PORT")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_PATIENCE):
            return address
    except (OSError, UnicodeError) as error:
        _refuse(f"nothing answers at {address} ({reason(error)})")


def _running() -> str:
    """Return the address of the cluster that `ray start` last started or joined on this machine."""
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    try:
        return (Path(folder) / _CURRENT).read_text().strip()
    except (OSError, UnicodeDecodeError):
        _refuse("no Ray is running on this machine; start one with `ray start --head`")


def _refuse(reason: str) -> NoReturn:
    given = os.environ.get(VARIABLE, "")
    raise BadRequestError(
        f"{VARIABLE}: {given!r} given; {reason}; give HOST:PORT of a cluster's head node (port {_PORT} "
        f"by default), or unset {VARIABLE} to start a local Ray that ends with the command"
    )
