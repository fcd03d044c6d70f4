"""Network: the interface over which a rank reaches those of other machines, and the variables that name it.

Gloo and NCCL read their settings from the environment. Without one, gloo listens at the address to which the
machine's own name resolves, which is often a loopback address, and NCCL at the first interface that it likes.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from runtime.errors import BadRequestError

log = logging.getLogger(__name__)

GLOO, NCCL, CARDS = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NCCL_IB_HCA"
_PREFIXES = ("GLOO_", "NCCL_", "TORCH_NCCL_", "UCX_", "FI_")
_INFINIBAND = Path("/sys/class/infiniband")
_ANY_PORT = 9  # no packet is sent there: a datagram socket only looks up the route


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank runs, as it tells the others when they meet.

    Attributes:
        host: its machine, as `heartbeats.host_name` has it.
        address: address from which it reaches the shared store; empty if unknown.
    """

    host: str
    address: str = ""


def network_settings() -> dict[str, str]:
    """Variables of this process that configure gloo and NCCL, to be handed on to ranks elsewhere."""
    return {name: value for name, value in os.environ.items() if name.startswith(_PREFIXES)}


def adopt(settings: Mapping[str, str]) -> None:
    """Set variables that another process handed on, except those that this machine sets itself."""
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def source_towards(host: str) -> str:
    """Address from which this machine sends to `host`; empty if there is no route to it."""
    with suppress(OSError, UnicodeError):
        family, _, _, _, there = socket.getaddrinfo(host, _ANY_PORT, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(there)
            return str(probe.getsockname()[0]).partition("%")[0]
    return ""


def check_interfaces(*, nccl: bool) -> None:
    """Refuse names of interfaces that this machine does not have.

    Args:
        nccl: whether ranks use NCCL, whose variables are checked as well.

    Raises:
        BadRequestError: the message has the variable, its value, and the interfaces that there are.
    """
    found = _interfaces()
    for name in filter(None, os.environ.get(GLOO, "").split(",")):
        if name not in found:
            _refuse(GLOO, f"{socket.gethostname()} has no interface {name!r}, but {', '.join(found)}")
        if not found[name]:
            _refuse(GLOO, f"the interface {name!r} of {socket.gethostname()} has no address or is down")
    if not nccl:
        return
    if not _matches(os.environ.get(NCCL, ""), found):
        _refuse(NCCL, f"no interface of {socket.gethostname()} matches it: there are {', '.join(found)}")
    cards = sorted(path.name for path in _INFINIBAND.iterdir()) if _INFINIBAND.is_dir() else []
    if not _matches(os.environ.get(CARDS, ""), cards):
        log.warning(
            "%s: %r given; no InfiniBand card of %s matches it (%s): NCCL would use TCP, which is slower",
            CARDS,
            os.environ[CARDS],
            socket.gethostname(),
            f"there are {', '.join(cards)}" if cards else "there is none",
        )


def choose_interface(rank: int, places: Sequence[Place], *, nccl: bool) -> None:
    """Let gloo and NCCL use the interface that reaches the store's machine, unless variables name another.

    Does nothing if all ranks are on one machine.

    Args:
        rank: this rank.
        places: where every rank runs.
        nccl: whether ranks use NCCL.

    Raises:
        BadRequestError: gloo is told to use an interface that other machines cannot reach.
    """
    own = places[rank]
    others = [place.address for place in places if place.host != own.host and not _is_local(place.address)]
    if not others:
        return
    # The store's own machine may know itself by a loopback address only.
    address = source_towards(others[0]) if _is_local(own.address) else own.address
    name = next((name for name, known in _interfaces().items() if address in known), None)
    if name is None or _is_local(address):
        log.warning("no interface of this machine has the address %r; set %s and %s", address, GLOO, NCCL)
        return
    given = os.environ.get(GLOO)
    if given and all(_is_local(known) for one in given.split(",") for known in _interfaces().get(one, ())):
        _refuse(GLOO, f"other machines cannot reach that interface; unset it, or set it to {name}")
    chosen = {GLOO: name} | ({NCCL: f"={name}"} if nccl else {})
    for variable, value in chosen.items():
        if not os.environ.get(variable):
            log.info("%s is not set; %s, which reaches the other machines, is used", variable, name)
            os.environ[variable] = value


def _interfaces() -> dict[str, list[str]]:
    """Interfaces of this machine → their IP addresses; none for one that is down."""
    up = {name: state.isup for name, state in psutil.net_if_stats().items()}
    families = (socket.AF_INET, socket.AF_INET6)
    return {
        name: [one.address.partition("%")[0] for one in known if one.family in families and up.get(name)]
        for name, known in psutil.net_if_addrs().items()
    }


def _matches(given: str, names: Sequence[str] | Mapping[str, object]) -> bool:
    """Return whether one of `names` fits a list as NCCL reads it: prefixes, `=` exact names, `^` all but."""
    if not given or given.startswith("^"):
        return True
    exact = given.startswith("=")
    wanted = [one.partition(":")[0] for one in given.removeprefix("=").split(",")]
    return any(name == one if exact else name.startswith(one) for one in wanted for name in names)


def _is_local(address: str) -> bool:
    """Return whether an address means the same machine wherever it is used, or none at all."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return True
    return found.is_loopback or found.is_unspecified


def _refuse(variable: str, why: str) -> None:
    raise BadRequestError(f"{variable}: {os.environ[variable]!r} given; {why}")
