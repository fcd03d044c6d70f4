"""Random faults: disturb jobs at random moments, and check that they end as promised.

    python scripts/chaos.py --runs 300 --jobs 2 --log out/chaos.jsonl --out docs/reliability.md

A fault is a signal (KILL, STOP, TERM, INT) to a random process of a job (the command, a helper that it
forks, a rank, one of Ray's own, ffmpeg), a disk that becomes full (a small tmpfs, where this user may mount
one), a limit on the size of files, or a clock that jumps (where there is a C compiler). It comes before,
during or after denoising, equally often. Everything is drawn from `--seed`; the moments are taken from an
undisturbed run of each job, which is made first.

Checks after each fault:
* the job ends within a bound, and with an exit code of the contract: 0, 3, or 130 if a signal asked it to
  stop (2 if a full disk keeps it from starting; death by SIGKILL if that hit the command itself);
* stderr says what happened, without a traceback, and stdout holds only the result's path;
* no process and no listening socket is left, and nothing in /dev/shm;
* the same command (with --resume if it has that option) then ends with 0, with the bits and the files of the
  undisturbed run and no others: no temporary and no half-written file;
* foreign files in all folders are unchanged.

Every run has a folder of its own, which is kept if something is wrong. Runs that are in the log already are
not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from chaos_faults import KINDS, Fault, Reference, Striker, choose_job, draw
from chaos_jobs import BUSY, JOBS, TIMEOUT, Bits, Job
from chaos_table import write_page
from chaos_watch import (
    MARKER,
    RAY,
    Marks,
    Member,
    files,
    harmed,
    kill,
    listening,
    members,
    open_sockets,
    plant,
    shared_memory,
    wait_for_end,
)

_ROOT = Path(__file__).resolve().parent.parent
_LOOK = 0.004  # seconds between two looks at a job
_GRACE = 5.0  # seconds in which what a command started may end after it
_FIRST = 300.0  # seconds for an undisturbed run
_ATTEMPTS = 3  # that a job on Ray may take


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended.

    Attributes:
        code: exit code, negative for a signal; None if it had to be killed.
        outlived: seconds for which processes that it had started outlived it.
        left: processes, sockets and shared memory that were still there after that.
    """

    code: int | None
    seconds: float
    stdout: str
    stderr: str
    outlived: float
    left: list[str]


@dataclass(slots=True)
class Record:
    """One fault and its outcome, as a line of the log.

    Attributes:
        struck: process or resource that was hit; empty if the job was over before.
        during: last mark before the fault.
        code, seconds: exit code of the disturbed command, and seconds from the fault to its end.
        resumed, resumed_seconds: the same for the command that resumed it; None if none was needed.
        problems: kinds of broken promises, and what was observed.
    """

    seed: int
    number: int
    job: str
    fault: dict[str, Any]
    struck: str = ""
    during: str = ""
    code: int | None = None
    seconds: float = 0.0
    resumed: int | None = None
    resumed_seconds: float = 0.0
    outlived: float = 0.0
    problems: list[tuple[str, str]] = field(default_factory=list)

    def blame(self, kind: str, what: str) -> None:
        self.problems.append((kind, what))


class Run:
    """One job in a folder of its own, disturbed or not."""

    def __init__(self, job: Job, folder: Path):
        self.job, self.folder, self.name = job, folder, f"{folder.parent.name}-{folder.name}"
        self._commands = 0
        for name in (*job.folders, RAY):
            (folder / name).mkdir(parents=True)

    def prepare(self) -> None:
        """Write files of the job, and foreign ones."""
        self.planted = plant(self.folder, self.job.folders)
        self.job.prepare(self.folder)

    def start(self, more: Sequence[str], bound: float, striker: Striker | None = None) -> tuple[Ended, Marks]:
        """Run the command to its end; it is killed `bound` seconds after the fault, or after its start."""
        self._commands += 1
        said = [self.folder / f"{stream}-{self._commands}" for stream in ("stdout", "stderr")]
        prefix, extra = (striker.prefix(), striker.environment()) if striker else ([], {})
        with said[0].open("wb") as out, said[1].open("wb") as err:
            process = subprocess.Popen(
                [*prefix, sys.executable, "-m", "launch", *self.job.arguments, *more],
                cwd=self.folder,
                env=self._environment() | extra,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        known = {name for name, _ in files(self.folder)}
        marks = Marks(self.folder, self.name, process.pid, said[1], known)
        sockets, shared = _follow(process, marks, striker, bound, self._now)
        code, seconds = process.poll(), marks.seconds
        ended = self._clean_up(process, code, striker, sockets, shared)
        texts = [path.read_text(errors="replace") for path in said]
        return Ended(code, seconds, *texts, *ended), marks

    def made(self) -> set[str]:
        """Names of all files and folders except the foreign ones."""
        foreign = {*self.planted, *(path.parent for path in self.planted)}
        return {name for name, path in files(self.folder) if path not in foreign}

    def _now(self, driver: int) -> list[Member]:
        return members(self.folder, self.name, driver)

    def _environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        temporary = {"TMPDIR": str(self.folder / "t"), "RAY_TMPDIR": str(self.folder / RAY)}
        return kept | temporary | {MARKER: self.name, "PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1"}

    def _clean_up(
        self,
        process: subprocess.Popen[bytes],
        code: int | None,
        striker: Striker | None,
        sockets: set[str],
        shared: set[str],
    ) -> tuple[float, list[str]]:
        """Find what the command left behind, and end it."""
        if code is None:
            stuck = self._now(process.pid)
            kill(stuck)
            process.wait()
            return 0.0, []
        grace = _GRACE if code >= 0 else _GRACE + 2 * TIMEOUT
        left, outlived = wait_for_end(self.folder, self.name, process.pid, grace)
        told = [f"process {member}" for member in left]
        kill(left)
        if not left and not _closed(sockets):
            told.append("a listening socket")
        told += [f"shared memory {name}" for name in shared if Path(name).exists()]
        return outlived, told


def _follow(
    process: subprocess.Popen[bytes],
    marks: Marks,
    striker: Striker | None,
    bound: float,
    now: Callable[[int], list[Member]],
) -> tuple[set[str], set[str]]:
    """Look at a command until it ends or its time is over; sockets and shared memory of its processes."""
    sockets: set[str] = set()
    shared: set[str] = set()
    noted = False
    since = 0.0
    while process.poll() is None and marks.seconds - since < bound:
        marks.look()
        if striker is not None:
            struck = bool(striker.struck)
            striker.look(marks, process.pid)
            if striker.struck and not struck:
                since = marks.seconds
        if not noted and (striker.struck if striker is not None else marks.seconds > 3):
            noted = True
            present = now(process.pid)
            sockets, shared = listening(present), shared_memory(present)
        time.sleep(_LOOK)
    marks.look()
    return sockets, shared


def undisturbed(job: Job, folder: Path) -> Reference:
    """Run a job without a fault."""
    run = Run(job, folder)
    run.prepare()
    ended, marks = run.start((), _FIRST)
    if ended.code != 0:
        raise SystemExit(f"{job.name}: undisturbed, it ends with {ended.code}\n{ended.stderr}")
    for what in (*ended.left, *harmed(run.planted)):
        print(f"{job.name}: undisturbed, it leaves or harms {what}", flush=True)
    unseen = sorted({*job.victims} - marks.roles.keys())
    if unseen:  # no fault would ever hit it, and nobody would notice
        raise SystemExit(f"{job.name}: undisturbed, it has no process with the role {', '.join(unseen)}")
    return Reference(ended.seconds, marks.timeline, marks.roles, frozenset(run.made()), job.bits(folder))


def disturb(seed: int, fault: Fault, job: Job, reference: Reference, folder: Path) -> Record:
    """Run a job, disturb it, resume it, and check the promises."""
    record = Record(seed, fault.number, job.name, asdict(fault))
    run = Run(job, folder)
    striker = Striker(fault, folder, run.name)
    striker.set_up()
    try:
        run.prepare()
        ended, _ = run.start((), _bound(job, fault, reference), striker)
        record.struck, record.during = striker.struck, striker.during
        record.code, record.seconds = ended.code, round(ended.seconds - striker.after, 2)
        record.outlived = round(ended.outlived, 2)
        _check_end(record, fault, ended, striker, job)
        striker.repair()
        try:
            job.repair(folder)
        except RuntimeError as error:
            record.blame("resume", str(error))
        _go_on(record, run, reference)
    finally:
        striker.tear_down()
    return record


def _bound(job: Job, fault: Fault, reference: Reference) -> float:
    """Seconds within which a disturbed job must have ended."""
    attempts = _ATTEMPTS if job.on_ray else 1
    known = fault.pause * fault.goes_on + 4 * TIMEOUT + 2 * BUSY
    return known + (attempts + 1) * reference.seconds + 30.0


def _check_end(record: Record, fault: Fault, ended: Ended, striker: Striker, job: Job) -> None:
    """Check how the disturbed command ended, what it said, and what it left."""
    if ended.code is None:
        record.blame("hang", f"it had not ended {record.seconds:.0f} s after the fault")
        return
    if ended.code not in _may_end_with(fault, striker):
        record.blame("exit code", str(ended.code))
    record.problems += [("leftover", what) for what in ended.left]
    if ended.code < 0:
        return
    if re.search(r"^Traceback|Fatal Python error|^\*\*\* SIG", ended.stderr, re.MULTILINE):
        record.blame("words", "a traceback")
    if ended.code != 0 and not re.search(
        r"^(lockstep|python -m launch\S*|Error): \S", ended.stderr, re.MULTILINE
    ):
        record.blame("words", "stderr does not say why it ended")
    if ended.code == 0 and not re.fullmatch(job.stdout, ended.stdout):
        record.blame("words", f"stdout: {ended.stdout[:200]!r}")
    if ended.code != 0 and ended.stdout:
        record.blame("words", f"stdout, though it failed: {ended.stdout[:200]!r}")


def _may_end_with(fault: Fault, striker: Striker) -> set[int]:
    """Exit codes that the contract allows after a fault."""
    codes = {0, 3}
    if fault.kind == "signal" and fault.how in ("INT", "TERM"):
        codes.add(130)
    if fault.kind in ("disk", "limit"):
        codes.add(2)
    if fault.on_command:
        number = signal.Signals[f"SIG{fault.how}"]
        if number == signal.SIGKILL:
            codes = {0, -number}
        elif not striker.caught:  # it hit the interpreter before a line of the command ran
            codes.add(-number)
    return codes


def _go_on(record: Record, run: Run, reference: Reference) -> None:
    """Repeat the command unless it was done, and compare its results with the undisturbed run."""
    if record.code != 0:
        again, _ = run.start(run.job.again, _FIRST)
        record.resumed, record.resumed_seconds = again.code, round(again.seconds, 2)
        if again.code != 0 and not _was_done(run, reference, again):
            words = " / ".join(again.stderr.strip().splitlines()[-3:])
            record.blame("resume", f"the command that resumes ends with {again.code}: {words}")
        record.problems += [("leftover", f"after the resume: {what}") for what in again.left]
    _check_bits(record, run, reference.bits)
    record.problems += [("leftover", name) for name in sorted(run.made() - reference.files - _OWN)]
    record.problems += [("foreign file", str(path.relative_to(run.folder))) for path in harmed(run.planted)]


_OWN = frozenset({"stdout-1", "stderr-1", "stdout-2", "stderr-2", "clock"})


def _was_done(run: Run, reference: Reference, again: Ended) -> bool:
    """Return whether the command refused to run again because everything was done already."""
    return again.code == 2 and " exists; " in again.stderr and run.made() - _OWN == reference.files - _OWN


def _check_bits(record: Record, run: Run, wanted: Bits) -> None:
    try:
        found = run.job.bits(run.folder)
    except (OSError, KeyError, ValueError, subprocess.CalledProcessError) as error:
        record.blame("bits", f"no result: {error}")
        return
    wrong = [name for name in wanted if found.get(name) != wanted[name]]
    if wrong:
        record.blame("bits", f"{', '.join(wrong)} differ from those of the undisturbed run")


class Campaign:
    """Many faults, some of them side by side.

    Args:
        names: jobs to choose from.
        kinds: kinds of faults, from `chaos_faults.KINDS`.
        folder: folder of all runs.
        log: file of records; existing ones are read.
    """

    def __init__(
        self, seed: int, names: Sequence[str], kinds: Sequence[str], folder: Path, log: Path | None = None
    ):
        self._seed, self._names, self._kinds = seed, names, kinds
        self._folder, self._log = folder, log
        self._references: dict[str, Reference] = {}
        self.records: list[Record] = [] if log is None else read_log(log)

    def run(self, numbers: Sequence[int], jobs: int = 1) -> None:
        """Make the runs with these numbers that are not in the log."""
        done = {(record.seed, record.number) for record in self.records}
        chosen = {n: choose_job(self._seed, n, self._names) for n in numbers if (self._seed, n) not in done}
        with ThreadPoolExecutor(jobs) as pool:
            firsts = {name: pool.submit(self._first, name) for name in sorted(set(chosen.values()))}
            self._references = {name: future.result() for name, future in firsts.items()}
            futures = [pool.submit(self._one, number, JOBS[name]) for number, name in chosen.items()]
            for future in as_completed(futures):
                self._keep(future.result())

    def _first(self, name: str) -> Reference:
        folder = self._folder / name
        reference = undisturbed(JOBS[name], folder)
        print(f"{name}: undisturbed {reference.seconds:.1f} s, {len(reference.timeline)} marks", flush=True)
        shutil.rmtree(folder)
        return reference

    def _one(self, number: int, job: Job) -> Record:
        reference = self._references[job.name]
        fault = draw(self._seed, number, job, reference, self._kinds)
        folder = self._folder / str(number)
        record = disturb(self._seed, fault, job, reference, folder)
        if not record.problems:
            shutil.rmtree(folder)
        return record

    def _again(self, record: Record) -> str:
        """Command that makes only this run."""
        chosen = [f"--only {name}" for name in self._names if len(self._names) < len(JOBS)]
        chosen += [f"--fault {kind}" for kind in self._kinds if len(self._kinds) < len(KINDS)]
        first = ["python scripts/chaos.py", f"--seed {record.seed} --first {record.number} --runs 1"]
        return " ".join(first + chosen)

    def _keep(self, record: Record) -> None:
        self.records.append(record)
        if self._log is not None:
            with self._log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(record)) + "\n")
        fault = Fault(**record.fault)
        what = "ok" if not record.problems else "WRONG"
        print(
            f"{record.number} {record.job}: {fault.told} → {record.code} after {record.seconds:.1f} s"
            + (
                f", then {record.resumed} in {record.resumed_seconds:.1f} s"
                if record.resumed is not None
                else ""
            )
            + f": {what}{'' if record.struck else ' (it was over before)'}",
            flush=True,
        )
        for kind, problem in record.problems:
            print(f"    {kind}: {problem}", flush=True)
        if record.problems:
            print(
                f"    kept in {self._folder / str(record.number)}; again: {self._again(record)}", flush=True
            )


def read_log(log: Path) -> list[Record]:
    """Read the records of a log; none if there is no log."""
    if not log.is_file():
        return []
    return [Record(**json.loads(line)) for line in log.read_text(encoding="utf-8").splitlines()]


def _made() -> str:
    """Write how and when a page was made."""
    told = ", ".join(f"{name} {version(name)}" for name in ("torch", "ray"))
    return f"Made on {os.cpu_count()} cores, the last on {date.today()}; {told}."


def _closed(sockets: set[str], within: float = 5.0) -> bool:
    """Return whether these sockets are closed; the kernel closes a process's sockets after its end."""
    deadline = time.monotonic() + within
    while sockets & open_sockets():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, help="number of the first run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--only", action="append", choices=list(JOBS), help="this job; may be repeated")
    parser.add_argument("--fault", action="append", choices=KINDS, help="this kind of fault; may be repeated")
    parser.add_argument("--log", type=Path, help="JSON lines, one for each run")
    parser.add_argument("--out", type=Path, help="the page with the tables of the log")
    given = parser.parse_args()
    started = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    campaign = Campaign(given.seed, given.only or list(JOBS), given.fault or KINDS, folder, given.log)
    campaign.run(range(given.first, given.first + given.runs), given.jobs)
    wrong = sum(bool(record.problems) for record in campaign.records)
    print(f"{len(campaign.records)} faults, {wrong} wrong, {time.monotonic() - started:.0f} s")
    if given.out is not None:
        write_page([asdict(record) for record in campaign.records], given.out, _made())
    if not any(folder.iterdir()):
        folder.rmdir()
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
