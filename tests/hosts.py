"""Hosts: network namespaces of this machine with names and disks of their own, and one link between them.

What runs on a host sees only its own network, host name and disk; files elsewhere are those of this machine,
as if the same software were installed on all hosts. NCCL and real network cards are not tested by this.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tests.forked import Command

_NEW_NET, _NEW_MOUNTS, _NEW_UTS = 0x40000000, 0x00020000, 0x04000000  # flags of setns(2) and unshare(2)
_PRIVATE, _BIND = (1 << 18) | (1 << 14), 1 << 12  # flags of mount(2): private and all below; a folder again
_CARD = "net0"
_numbers = itertools.count()


@cache
def why_not() -> str:
    """Reason why this machine cannot have such hosts; empty if it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need the program `ip`"
    name = f"lockstep-try-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"`ip netns` does not work here: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return ""


@dataclass(frozen=True, slots=True)
class Host:
    """One host.

    Attributes:
        name: its host name.
        address: its address on the link.
        space: name of its network namespace.
        disk: folder with the content of its disk.
        mount: where it sees its disk, the same folder on every host.
        names: file that it sees as /etc/hosts.
    """

    name: str
    address: str
    space: str
    disk: Path
    mount: Path
    names: Path

    def enter(self) -> None:
        """Let this process, and all that it starts, run on this host."""
        with Path("/var/run/netns", self.space).open() as space:
            _call("setns", space.fileno(), _NEW_NET)
        _call("unshare", _NEW_MOUNTS | _NEW_UTS)
        socket.sethostname(self.name)
        _call("mount", None, b"/", None, _PRIVATE, None)
        for inside, seen in ((self.disk, self.mount), (self.names, Path("/etc/hosts"))):
            _call("mount", os.fsencode(inside), os.fsencode(seen), None, _BIND, None)

    def start(self, words: Sequence[str], module: str, **options: Any) -> Command:
        """Start `python -m module words` on this host."""
        return Command(words, module, enter=self.enter, **options)

    def ip(self, *words: str) -> None:
        """Run `ip` in its network."""
        subprocess.run(["ip", "-n", self.space, *words], check=True)

    def traffic(self, *words: str) -> None:
        """Run `tc` in its network, for its card on the link."""
        verbs, more = words[:2], words[2:]
        subprocess.run(["tc", "-n", self.space, *verbs, "dev", _CARD, *more], check=True)

    def link(self, state: str) -> None:
        """Set its card on the link `up` or `down`."""
        self.ip("link", "set", _CARD, state)

    def processes(self) -> list[int]:
        """Numbers of the processes on this host."""
        command = ["ip", "netns", "pids", self.space]
        told = subprocess.run(command, capture_output=True, text=True, check=False)
        return [int(number) for number in told.stdout.split()]


@contextmanager
def hosts(folder: Path, names: Sequence[str] = ("host-a", "host-b")) -> Iterator[list[Host]]:
    """Make two hosts on one link; whatever runs on them at the end is killed, and nothing of them is left.

    As on Debian, the name of each resolves to 127.0.1.1 on itself.
    """
    mount, made = folder / "disk", list[Host]()
    mount.mkdir(parents=True)
    number = next(_numbers)
    try:
        for place, name in enumerate(names):
            disk, known = folder / name, folder / f"{name}.hosts"
            disk.mkdir()
            known.write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n")
            space = f"lockstep-{os.getpid()}-{number}-{place}"
            host = Host(name, f"10.77.0.{place + 1}", space, disk, mount, known)
            subprocess.run(["ip", "netns", "add", space], check=True)
            made.append(host)
            host.ip("link", "set", "lo", "up")
        first, second = made
        peer = ("peer", "name", _CARD, "netns", second.space)
        first.ip("link", "add", _CARD, "type", "veth", *peer)
        for host in made:
            host.ip("addr", "add", f"{host.address}/24", "dev", _CARD)
            host.link("up")
        yield made
    finally:
        for host in made:
            _end(host)
            subprocess.run(["ip", "netns", "del", host.space], check=False)


def _end(host: Host) -> None:
    """Kill what runs on a host, and wait for its end."""
    deadline = time.monotonic() + 10
    while (left := host.processes()) and time.monotonic() < deadline:
        for number in left:
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        time.sleep(0.05)


def _call(name: str, *arguments: Any) -> None:
    """Call a function of the C library.

    Raises:
        OSError: it fails.
    """
    library = ctypes.CDLL(None, use_errno=True)
    if getattr(library, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
