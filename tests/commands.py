"""`lockstep generate` as a process of its own, and what it has started, as seen from outside."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from tests.forked import Command, completed
from tests.jobs import PROMPT

STEPS = 40
SIZE = ["--size", "64x48", "--frames", "5", "--steps", str(STEPS), "--spectrum", "off"]

Members = dict[str, psutil.Process]


def generate(out: Path, *options: str) -> list[str]:
    """The command's words, on Ray; `options` say on how many ranks, by default two, one for each branch."""
    ranks = options or ("--ranks", "2", "--cfg", "2")
    command = ["generate", PROMPT, "--launcher", "ray", *ranks, *SIZE]
    return [*command, "--out", str(out), "--checkpoint-every", "1", "--timeout", "5"]


def environment(cluster: str = "") -> dict[str, str]:
    """This one, with the address of a cluster; without, the command starts a Ray of its own, as a user's."""
    own = {name: value for name, value in os.environ.items() if cluster or name != "RAY_worker_niceness"}
    return own | {"RAY_ADDRESS": cluster}


@contextmanager
def generating(
    out: Path, *options: str, step: int = STEPS // 10, cluster: str = ""
) -> Iterator[tuple[Command, Members]]:
    """The command, whose ranks have done this step (a tenth of all, or several), and its family by name."""
    words, pipe = generate(out, *options), subprocess.PIPE
    with Command(words, stdout=pipe, stderr=pipe, env=environment(cluster)) as process:
        assert process.stderr is not None
        line = "begin"
        while line and f"step {step}/" not in line:
            line = process.stderr.readline()
        yield process, family(process)


def family(process: Command) -> Members:
    """The command, its keeper, its driver, and all that they started, by their names."""
    members = psutil.Process(process.pid).children(recursive=True)
    keeper = next(member for member in members if member.ppid() == process.pid)
    driver = next(member for member in members if member.ppid() == keeper.pid)
    known = {"command": psutil.Process(process.pid), "keeper": keeper, "driver": driver}
    return {title(member): member for member in members} | known


def title(process: psutil.Process) -> str:
    """What a process of Ray calls itself; its number where it is any Python."""
    name = (process.cmdline() or [""])[0].rpartition("/")[2].strip()
    return f"{process.pid}" if name.startswith("python") else name


def marked(variable: str, value: str) -> list[psutil.Process]:
    """Processes that run with this variable in their environment, which they pass on to what they start."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(variable) == value and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def running(process: psutil.Process) -> bool:
    """Whether it has not ended; one that nobody has waited for has."""
    with suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def check_nothing_is_left(members: Members) -> None:
    left = psutil.wait_procs(list(members.values()), timeout=30)[1]
    assert all(process.status() == psutil.STATUS_ZOMBIE for process in left), left


def digests(out: Path) -> list[str]:
    """Digests of the frames, by the report."""
    told: list[str] = json.loads(out.with_suffix(".json").read_text())["frames_sha256"]
    return told


def made_alone(out: Path) -> list[str]:
    """Digests of the frames that one rank makes; two ranks of cfg make the same bits."""
    completed(["generate", PROMPT, *SIZE, "--out", str(out)]).check_returncode()
    return digests(out)
