"""Where the environment says that a Ray cluster is."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import NoReturn

from runtime.errors import BadRequestError

VARIABLE = "RAY_ADDRESS"
_PATIENCE = 5.0  # seconds for a port to answer
_PORT = 6379  # that `ray start --head` takes by default
_CURRENT = (
    Path("ray") / "ray_current_cluster"
)  # where `ray start` writes its address, in its temporary folder


def cluster_address() -> str | None:
    """HOST:PORT of the cluster that RAY_ADDRESS names, where something listens; None to start a local one.

    Raises:
        BadRequestError: it names none, or nothing answers there.
    """
    given = os.environ.get(VARIABLE, "").strip()
    if given in ("", "local"):
        return None
    address = _running() if given == "auto" else given
    if "://" in address:
        _refuse("a scheme is for Ray's other clients")
    host, colon, port = address.rpartition(":")
    if not (host and colon and port.isdecimal() and 0 < int(port) < 65536):
        _refuse("it is no address")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_PATIENCE):
            return address
    except (OSError, UnicodeError) as error:
        _refuse(f"nothing answers at {address} ({getattr(error, 'strerror', None) or error})")


def _running() -> str:
    """The cluster that `ray start` has last started or joined here."""
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    try:
        return (Path(folder) / _CURRENT).read_text().strip()
    except (OSError, UnicodeDecodeError):
        _refuse("no Ray runs on this machine; `ray start --head` starts one")


def _refuse(reason: str) -> NoReturn:
    given = os.environ.get(VARIABLE, "")
    raise BadRequestError(
        f"{VARIABLE}: {given!r} given; {reason}; give HOST:PORT of a cluster's head (its port is {_PORT} "
        f"by default), or unset {VARIABLE} to use a Ray of this machine that ends with the command"
    )
