"""Faults of `scripts/chaos.py`: drawn from a seed, and caused at their moments."""

from __future__ import annotations

import atexit
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from chaos_jobs import TIMEOUT, Bits, Job
from chaos_watch import Marks, Member, members

SIGNALS = ("KILL", "STOP", "TERM", "INT")
KINDS = ("signal", "disk", "limit", "clock")
_SIZE = "8m"  # of a disk that becomes full
_JUMPS = ("3600", "-3600", "30", "-30", "34560000")  # seconds
_BALLAST = ".ballast"
_CLOCK = Path(__file__).with_name("chaos_clock.c")


@dataclass(frozen=True, slots=True)
class Reference:
    """An undisturbed run of a job.

    Attributes:
        timeline: its marks (see `chaos_watch.Marks`), with seconds since its start.
        roles: when processes of each role were first and last seen.
        files: files that it leaves.
    """

    seconds: float
    timeline: Sequence[tuple[str, float]]
    roles: dict[str, tuple[float, float]]
    files: frozenset[str]
    bits: Bits

    def phases(self, job: Job) -> list[list[int]]:
        """Numbers of the marks before, during and after denoising, without empty phases."""
        names = [name for name, _ in self.timeline]
        first = next((n for n, name in enumerate(names) if re.search(job.begins, name)), len(names))
        last = next((n for n, name in enumerate(names) if re.search(job.ends, name)), len(names))
        every = range(len(names))
        phases = [list(every[:first]), list(every[first:last]), list(every[last:])]
        return [phase for phase in phases if phase]


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault.

    Attributes:
        kind: one of `KINDS`.
        target: role of the process, or the folder whose disk becomes full.
        how: signal, size limit of files in bytes, or seconds by which the clock jumps.
        mark, late, before: it comes `late` seconds after `mark`, at the latest with the mark `before`.
        pause: seconds after which a stopped process is continued, if it is.
        pick: choice among several processes of one role, from 0 to 1.
    """

    number: int
    job: str
    kind: str
    target: str
    how: str
    mark: str
    late: float
    before: str
    pause: float
    pick: float

    @property
    def on_command(self) -> bool:
        """Whether the command itself is hit, so that nobody else can report how it ends."""
        return self.kind == "signal" and self.target in ("driver", "terminal")

    @property
    def goes_on(self) -> bool:
        """Whether the stopped process is continued, as nothing would replace it within ten minutes."""
        joins = self.target == "ffmpeg" and self.job.startswith("film")
        return self.how == "STOP" and (self.target == "driver" or joins)

    @property
    def told(self) -> str:
        return (
            f"{self.kind} {self.target} {self.how}".replace("  ", " ") + f" at {self.mark!r}+{self.late:.3f}"
        )


def choose_job(seed: int, number: int, jobs: Sequence[str]) -> str:
    """Job of fault `number`."""
    return random.Random(f"{seed}/{number}/job").choice(jobs)


def draw(seed: int, number: int, job: Job, reference: Reference, kinds: Sequence[str]) -> Fault:
    """Draw fault `number` of a seed: all phases of the job are equally likely, and all marks of a phase."""
    rng = random.Random(f"{seed}/{number}")
    possible = [kind for kind in kinds if can(kind, job)]
    weights = [6 if kind == "signal" else 1 for kind in possible]
    kind = rng.choices(possible, weights)[0]
    target, how = "", ""
    since, until = 0.0, reference.seconds
    if kind == "signal":
        target = rng.choice(job.victims)
        how = "INT" if target == "terminal" else rng.choice(SIGNALS)
        if target not in ("driver", "terminal"):
            since, until = reference.roles[target]
    elif kind == "disk":
        target = rng.choice(job.folders)
    elif kind == "limit":
        how = str(int(2 ** rng.uniform(8, 17)))
    else:
        how = rng.choice(_JUMPS)
    mark, late, before = _moment(rng, job, reference, since, until)
    pause = round(rng.uniform(1.0, 2.5 * TIMEOUT), 2)
    return Fault(number, job.name, kind, target, how, mark, round(late, 3), before, pause, rng.random())


def _moment(
    rng: random.Random, job: Job, reference: Reference, since: float, until: float
) -> tuple[str, float, str]:
    """Draw a mark within this time of the undisturbed run, a delay after it, and the mark that follows."""
    times = [seconds for _, seconds in reference.timeline] + [reference.seconds]
    phases = [
        [number for number in phase if times[number + 1] >= since and times[number] <= until]
        for phase in reference.phases(job)
    ]
    number = rng.choice(rng.choice([phase for phase in phases if phase]))
    start = max(times[number], min(since, times[number + 1]))
    late = rng.uniform(start, max(start, times[number + 1])) - times[number]
    names = [name for name, _ in reference.timeline] + [""]
    return names[number], late, names[number + 1]


def can(kind: str, job: Job) -> bool:
    """Return whether this kind of fault can be caused on this machine."""
    if kind == "disk":
        return _can_mount()
    if kind == "limit":
        return not job.on_ray  # Ray's object store is one large file
    return kind != "clock" or _clock() is not None


@cache
def _can_mount() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        if _mount(Path(folder)):
            subprocess.run(["umount", folder], check=True)
            return True
    return False


def _mount(folder: Path) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", f"size={_SIZE}", "chaos", str(folder)]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


@cache
def _clock() -> Path | None:
    """Build the library with a clock that jumps; None without a C compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        return None
    library = Path(tempfile.mkdtemp(prefix="chaos-clock-")) / "clock.so"
    atexit.register(shutil.rmtree, library.parent)
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", str(library), str(_CLOCK)], check=True)
    return library


class Striker:
    """Causes one fault in the folder of a run.

    Attributes:
        struck: process that was hit, or description of the fault; empty until then.
        after: seconds since the start, and the last mark, at that moment.
    """

    def __init__(self, fault: Fault, folder: Path, run: str):
        self._fault, self._folder, self._run = fault, folder, run
        self._due: float | None = None
        self._stopped: tuple[int, float] | None = None
        self._pid = 0
        self.struck, self.after, self.during = "", 0.0, ""
        self.caught = True  # whether the process had a handler for the signal
        self.before: list[Member] = []

    def set_up(self) -> None:
        """Prepare the fault before the command starts."""
        if self._fault.kind == "disk" and not _mount(self._folder / self._fault.target):
            raise RuntimeError(f"cannot mount a disk at {self._folder / self._fault.target}")
        if self._fault.kind == "clock":
            (self._folder / "clock").write_bytes(struct.pack("q", 0))
        if self._fault.kind == "limit":
            self.struck = f"at most {self._fault.how} bytes a file"

    def prefix(self) -> list[str]:
        """Words before the command with which it is started."""
        if self._fault.kind == "limit":
            return ["prlimit", f"--fsize={self._fault.how}"]
        return []

    def environment(self) -> dict[str, str]:
        if self._fault.kind != "clock":
            return {}
        return {"LD_PRELOAD": str(_clock()), "LOCKSTEP_CHAOS_CLOCK": str(self._folder / "clock")}

    def look(self, marks: Marks, driver: int) -> None:
        """Cause the fault if its moment has come, and continue a stopped process after its pause."""
        if self._stopped is not None:
            pid, until = self._stopped
            if marks.seconds >= until:
                _send(pid, signal.SIGCONT)
                self._stopped = None
        if self.struck:
            return
        if self._due is None:
            self._due = next(
                (at + self._fault.late for name, at in marks.timeline if name == self._fault.mark), None
            )
        if self._due is None:
            return
        late = marks.seconds >= self._due or self._fault.before in dict(marks.timeline)
        if late and self._strike(driver):
            self.after, self.during = marks.seconds, marks.last
            if self._fault.goes_on:
                self._stopped = self._pid, marks.seconds + self._fault.pause

    def _strike(self, driver: int) -> bool:
        match self._fault.kind:
            case "signal":
                return self._send_signal(driver)
            case "disk":
                _fill(self._folder / self._fault.target)
            case "clock":
                with (self._folder / "clock").open("r+b") as clock:
                    clock.write(struct.pack("q", int(self._fault.how)))
        self.struck = self._fault.kind
        return True

    def _send_signal(self, driver: int) -> bool:
        """Send the signal to a process of the role; return False if there is none yet."""
        number = signal.Signals[f"SIG{self._fault.how}"]
        if self._fault.target == "terminal":
            self.before = members(self._folder, self._run, driver)
            self.caught = _handles(driver, number)
            os.killpg(driver, number)
            self.struck = f"process group {driver}"
            return True
        self.before = members(self._folder, self._run, driver)
        hit = [member for member in self.before if member.role == self._fault.target]
        if not hit:
            return False
        victim = hit[int(self._fault.pick * len(hit))]
        self.caught = _handles(victim.pid, number)
        if not _send(victim.pid, number):
            return False
        self._pid, self.struck = victim.pid, str(victim)
        return True

    def repair(self) -> None:
        """Make room on the full disk again."""
        if self._fault.kind == "disk":
            (self._folder / self._fault.target / _BALLAST).unlink(missing_ok=True)

    def tear_down(self) -> None:
        """Unmount the disk; its files are kept in the folder."""
        if self._fault.kind != "disk":
            return
        place = self._folder / self._fault.target
        kept = place.with_name(place.name + ".kept")
        subprocess.run(["cp", "-a", str(place), str(kept)], check=False, capture_output=True)
        subprocess.run(["umount", "--lazy", str(place)], check=True)
        place.rmdir()
        kept.rename(place)


def _fill(folder: Path) -> None:
    with (folder / _BALLAST).open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                continue
        except OSError:
            return


def _send(pid: int, number: int) -> bool:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def _handles(pid: int, number: int) -> bool:
    """Return whether a process has a handler of its own for a signal.

    Python catches SIGINT from its start on. Commands set their handlers in the order of `ENDING`: one that
    catches SIGTERM has that for SIGINT.
    """
    if number == signal.SIGINT:
        number = signal.SIGTERM
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught, 16) >> (number - 1) & 1)
