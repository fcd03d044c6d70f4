"""Observation of one command: its processes, files and output while it runs, and what it leaves behind."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
from chaos_jobs import normal

MARKER = "LOCKSTEP_CHAOS_RUN"
_SCAN = 0.2  # seconds between two looks at all processes
RAY = "r"  # folder of Ray's own files, which Ray keeps
_CACHES = re.compile(r"t/torchinductor_\w+(/|$)|t/matplotlib")  # of libraries
_ROLES = (  # first match counts; of the command line
    (re.compile(r"^\S*ffmpeg\S* "), "ffmpeg"),
    (re.compile(r"^\S*/raylet "), "raylet"),
    (re.compile(r"^\S*/gcs_server "), "gcs"),
    (re.compile(r"^ray::RankActor"), "rank"),
    (re.compile(r"^\S*python\S* (-\w )*-m launch\.(torchrun|commands\.calibrate) "), "rank"),
    (
        re.compile(r"^ray::\w*Agent|/dashboard/agent\.py|runtime_env/agent/main\.py|/(log_)?monitor\.py"),
        "agent",
    ),
    (re.compile(r"^ray::|default_worker\.py"), "worker"),
)


@dataclass(frozen=True, slots=True)
class Member:
    """A process of a run."""

    pid: int
    role: str
    command: str

    def __str__(self) -> str:
        """Write process id and beginning of the command, without folders, which differ between machines."""
        return f"{self.pid} {without_folders(self.command)[:80]}"


def without_folders(command: str) -> str:
    """Shorten every absolute path in a command to its last part."""
    return re.sub(r"(?<!\S)/\S*/", "", command)


def members(folder: Path, run: str, driver: int) -> list[Member]:
    """List the living processes of a run: those with its name in their environment, its folder as working
    directory or in their command line, and their children. (Titles that processes set overwrite their
    environment.)"""
    own_words = _words(driver)
    found: dict[int, Member] = {}
    others: list[tuple[int, int, str]] = []
    wanted = f"{MARKER}={run}".encode()
    for pid in psutil.pids():
        try:
            with Path(f"/proc/{pid}/stat").open() as file:
                state, parent = file.read().rpartition(")")[2].split()[:2]
            if state in "ZX":
                continue
            command = _words(pid)
            place = Path(f"/proc/{pid}/cwd").readlink()
            own = (
                place.is_relative_to(folder)
                or f"{folder}/" in command
                or wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            )
        except (OSError, ValueError):
            continue  # it has ended, or it is another user's
        if own and pid != os.getpid():
            found[pid] = Member(pid, role_of(pid, command, driver, own_words), command.strip())
        else:
            others.append((pid, int(parent), command))
    grown = True
    while grown:
        grown = False
        for pid, parent, command in others:
            if parent in found and pid not in found:
                role = role_of(pid, command, driver, own_words)
                found[pid], grown = Member(pid, role, command.strip()), True
    return sorted(found.values(), key=lambda member: member.pid)


def _words(pid: int) -> str:
    """Command line of a process, each word followed by a space; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def role_of(pid: int, command: str, driver: int, words: str) -> str:
    """Role of a process in a run; `other` if none is known.

    Args:
        command: its command line, each word followed by a space.
        driver, words: process id and command line of the run's command. What this forks, to drive Ray and to
            clean up, has the same words.
    """
    if pid == driver:
        return "driver"
    if words and command == words:
        return "helper"
    return next((role for pattern, role in _ROLES if pattern.search(command)), "other")


def kill(run: list[Member]) -> None:
    """Kill the processes that are left of a run."""
    for member in run:
        try:
            os.kill(member.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def wait_for_end(folder: Path, run: str, driver: int, seconds: float) -> tuple[list[Member], float]:
    """Wait at most some seconds for processes to end; return those left, and how long there were any."""
    started = time.monotonic()
    while True:
        left = [member for member in members(folder, run, driver) if member.pid != driver]
        took = time.monotonic() - started
        if not left or took > seconds:
            return left, took
        time.sleep(0.1)


def listening(processes: list[Member]) -> set[str]:
    """Inodes of the TCP sockets on which these processes listen."""
    held = set()
    for member in processes:
        try:
            for descriptor in Path(f"/proc/{member.pid}/fd").iterdir():
                target = str(descriptor.readlink())
                if target.startswith("socket:["):
                    held.add(target[8:-1])
        except OSError:
            continue  # it has ended
    return held & open_sockets()


def open_sockets() -> set[str]:
    """Inodes of all listening TCP sockets of this machine."""
    found = set()
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                found.add(fields[9])
    return found


def shared_memory(processes: list[Member]) -> set[str]:
    """Files in /dev/shm that these processes have mapped or open."""
    found = set()
    for member in processes:
        try:
            maps = Path(f"/proc/{member.pid}/maps").read_text()
        except OSError:
            continue
        found |= {line.split(maxsplit=5)[5] for line in maps.splitlines() if " /dev/shm/" in line}
    return {name for name in found if not name.endswith("(deleted)")}


def files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Normalised names and paths of a run's files and folders, without Ray's own and caches. Names of folders
    end in `/`."""
    for root, folders, names in os.walk(folder):
        base = Path(root)
        if base == folder and RAY in folders:
            folders.remove(RAY)
        for name in [*names, *(f"{name}/" for name in folders)]:
            told = normal(str((base / name).relative_to(folder)) + ("/" if name.endswith("/") else ""))
            if not _CACHES.match(told):
                yield told, base / name


def digest_of(path: Path) -> str:
    """Digest of a foreign file."""
    return f"{path.stat().st_mtime_ns} {hashlib.sha256(path.read_bytes()).hexdigest()}"


def plant(folder: Path, folders: tuple[str, ...]) -> dict[Path, str]:
    """Write foreign files where the job works, some with names like its own; they must stay unchanged."""
    planted = []
    for name in folders:
        base = folder / name
        planted += [base / "notes.txt", base / "photos" / "p.jpg"]
        planted += [base / ".video.another-host.1.abcdefgh.part.mp4", base / "lockstep-notes" / "0.rgb"]
    for path in planted:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"somebody's {path.name}\n")
    return {path: digest_of(path) for path in planted}


def harmed(planted: dict[Path, str]) -> list[Path]:
    """List the foreign files that have changed."""
    return [path for path, digest in planted.items() if not path.is_file() or digest_of(path) != digest]


class Marks:
    """Marks of a command's progress, as seen from outside: its output, its files, its processes.

    Each is recorded once, with the seconds since the start, under a name that is the same in every run."""

    def __init__(self, folder: Path, run: str, driver: int, words: Path, known: set[str]):
        self._folder, self._run, self._driver, self._words = folder, run, driver, words
        self._seen, self._known = set(known), frozenset(known)
        self._read, self._started, self._looked = 0, time.monotonic(), 0.0
        self.timeline: list[tuple[str, float]] = [("start", 0.0)]
        self.roles: dict[str, tuple[float, float]] = {"driver": (0.0, 0.0), "terminal": (0.0, 0.0)}

    def look(self) -> None:
        """Record new marks."""
        for line in self._lines():
            self._tell(line)
        for name, _ in files(self._folder):
            if ".part" not in name and "/" in name[:-1] and not name.startswith("t/"):
                self._tell(name)
        if self.seconds - self._looked > _SCAN:
            self._looked = self.seconds
            for member in members(self._folder, self._run, self._driver):
                self._tell(f"process {member.role}")
                since, _ = self.roles.get(member.role, (self.seconds, 0.0))
                self.roles[member.role] = since, self.seconds
            self.roles["terminal"] = self.roles["driver"]

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    @property
    def last(self) -> str:
        return self.timeline[-1][0]

    def _lines(self) -> list[str]:
        with self._words.open("rb") as file:
            file.seek(self._read)
            fresh = file.read()
        whole = fresh[: fresh.rfind(b"\n") + 1]
        self._read += len(whole)
        return [self._normal(line) for line in whole.decode(errors="replace").splitlines()]

    def _normal(self, line: str) -> str:
        line = line.replace(str(self._folder), "FOLDER")
        return re.sub(r"  (computed|forecast) .*|\d+(\.\d+)? s\b.*", "", line).strip()

    def _tell(self, name: str) -> None:
        if name and name not in self._seen:
            self._seen.add(name)
            self.timeline.append((name, self.seconds))
