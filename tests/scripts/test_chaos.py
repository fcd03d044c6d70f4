"""A short seeded selection of random faults; and that the checks of the long one would see what is wrong."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from chaos import Campaign, Ended, Record, _check_end, undisturbed
from chaos_faults import Fault, Reference, Striker, choose_job, draw
from chaos_jobs import JOBS
from chaos_table import by_job, by_signal, write_page
from chaos_watch import MARKER, harmed, kill, members, plant, role_of, wait_for_end

from tests.places import ROOT

SEED = 1  # whose first fault hits while it denoises
TIMELINE = [("start", 0.0), ("loading", 4.0), ("step 1/24", 5.0), ("step 24/24", 6.0), ("out/video.mp4", 6.5)]
ROLES = {"driver": (0.0, 7.0), "terminal": (0.0, 7.0), "ffmpeg": (4.9, 6.4)}
REFERENCE = Reference(7.0, TIMELINE, ROLES, frozenset(), {})


def fault(target: str = "ffmpeg", how: str = "KILL", kind: str = "signal") -> Fault:
    return Fault(0, "inline", kind, target, how, mark="start", late=0.0, before="", pause=1.0, pick=0.0)


def test_a_job_that_is_disturbed_ends_as_promised(tmp_path: Path) -> None:
    campaign = Campaign(seed=SEED, names=["inline"], kinds=["signal"], folder=tmp_path)
    campaign.run(range(1))
    [record] = campaign.records
    assert record.problems == [] and record.resumed is not None


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.timeout(900)
@pytest.mark.parametrize("job", ["torchrun", "ray", "queue-2", "film-2", "calibrate"])
def test_each_job_is_disturbed(job: str) -> None:
    with tempfile.TemporaryDirectory() as folder:  # a short name, as those of Ray's sockets are bounded
        campaign = Campaign(seed=1, names=[job], kinds=["signal"], folder=Path(folder))
        campaign.run(range(4))
    assert [record.problems for record in campaign.records] == [[]] * 4


def test_a_fault_is_a_function_of_seed_and_number() -> None:
    def drawn(seed: int) -> list[Fault]:
        return [draw(seed, n, JOBS["inline"], REFERENCE, ["signal", "limit"]) for n in range(200)]

    assert drawn(0) == drawn(0) != drawn(1)
    assert {fault.target for fault in drawn(0)} == {"", "driver", "terminal", "ffmpeg"}
    assert {fault.mark for fault in drawn(0)} == {mark for mark, _ in TIMELINE}
    assert all(fault.mark != "start" for fault in drawn(0) if fault.target == "ffmpeg")  # it is not there yet
    assert {choose_job(0, n, list(JOBS)) for n in range(100)} == set(JOBS)


@pytest.mark.parametrize(
    ("ended", "wrong"),
    [
        (Ended(0, 1.0, "out/video.mp4\n", "report …", 0.0, []), []),
        (Ended(3, 1.0, "", "lockstep: ffmpeg could not write", 0.0, []), []),
        (Ended(None, 1.0, "", "", 0.0, []), ["hang"]),
        (Ended(1, 1.0, "", "lockstep: no", 0.0, []), ["exit code"]),
        (Ended(130, 1.0, "", "lockstep: cancelled", 0.0, []), ["exit code"]),  # nobody asked for it
        (Ended(-9, 1.0, "", "", 0.0, []), ["exit code"]),  # it was not hit itself
        (Ended(3, 1.0, "", "", 0.0, ["process 7 raylet"]), ["leftover", "words"]),
        (Ended(3, 1.0, "", "Traceback (most recent call last)\nlockstep: no", 0.0, []), ["words"]),
        (Ended(0, 1.0, "a warning\nout/video.mp4\n", "", 0.0, []), ["words"]),
    ],
)
def test_what_breaks_a_promise_is_seen(ended: Ended, wrong: list[str], tmp_path: Path) -> None:
    record = Record(0, 0, "inline", asdict(fault()))
    _check_end(record, fault(), ended, Striker(fault(), tmp_path, "x"), JOBS["inline"])
    assert [kind for kind, _ in record.problems] == wrong


@pytest.mark.parametrize(
    ("hit", "code", "caught", "allowed"),
    [
        (fault("driver", "KILL"), -9, True, True),
        (fault("driver", "TERM"), 130, True, True),
        (fault("driver", "TERM"), -15, True, False),
        (fault("driver", "TERM"), -15, False, True),
        (fault("", "", "disk"), 2, True, True),
        (fault("driver", "TERM"), 2, True, False),
    ],
)
def test_exit_codes_depend_on_the_fault(
    hit: Fault, code: int, caught: bool, allowed: bool, tmp_path: Path
) -> None:
    record, striker = Record(0, 0, "inline", asdict(hit)), Striker(hit, tmp_path, "x")
    striker.caught = caught
    _check_end(record, hit, Ended(code, 1.0, "", "lockstep: so", 0.0, []), striker, JOBS["inline"])
    assert (not record.problems) == allowed


def test_foreign_files_are_watched(tmp_path: Path) -> None:
    planted = plant(tmp_path, ("out",))
    assert not harmed(planted)
    changed, gone, *_ = planted
    changed.write_text("something else")
    gone.unlink()
    assert harmed(planted) == [changed, gone]


def test_processes_are_found_by_name_or_folder_and_only_those(tmp_path: Path) -> None:
    waits = [sys.executable, "-c", "input()"]
    named = subprocess.Popen(waits, env=os.environ | {MARKER: "one"}, stdin=subprocess.PIPE)
    there = subprocess.Popen(waits, cwd=tmp_path, stdin=subprocess.PIPE)
    other = subprocess.Popen(waits, env=os.environ | {MARKER: "another"}, stdin=subprocess.PIPE)
    try:
        left, _ = wait_for_end(tmp_path, "one", 0, seconds=0.0)
        assert {member.pid for member in left} == {named.pid, there.pid}
        kill(left)
        assert (named.wait(10), there.wait(10)) == (-9, -9)
        assert not members(tmp_path, "one", 0)
        assert other.poll() is None
    finally:
        for process in (named, there, other):
            process.kill()
            process.communicate()


def test_a_victim_that_is_never_there_is_noticed(tmp_path: Path) -> None:
    """Otherwise its faults would silently hit something else."""
    job = replace(JOBS["inline"], victims=("driver", "ffmpeg", "raylet"))
    with pytest.raises(SystemExit, match="inline: undisturbed, it has no process with the role raylet"):
        undisturbed(job, tmp_path / "inline")


def test_ranks_and_helpers_are_recognised_by_the_words_they_are_started_with() -> None:
    """The modules are those that the command line starts."""
    words = "/usr/bin/python -m launch generate x "
    for module in re.findall(r'"(launch\.[\w.]+)", context\)', (ROOT / "launch" / "cli.py").read_text()):
        for options in ("", "-u ", "-P -u "):
            assert role_of(8, f"/usr/bin/python {options}-m {module} x ", 7, words) == "rank", module
    assert role_of(7, words, 7, words) == "driver"
    assert role_of(8, words, 7, words) == "helper"  # forked
    assert role_of(8, "/usr/bin/python -m http.server ", 7, words) == "other"
    assert role_of(8, "", 7, "") == "other"  # both have ended


def test_the_page_counts_what_was_wrong(tmp_path: Path) -> None:
    good = Record(0, 0, "inline", asdict(fault()), struck="7 ffmpeg", code=3, seconds=1.0)
    hung = Record(0, 1, "inline", asdict(fault("driver")), struck="8", problems=[("hang", "for ever")])
    records = [asdict(good), asdict(hung)]
    assert "| inline | ffmpeg | 1 | 0 | 1 | 0 | 0 | 0 | 1.0, 1.0 | 0 |" in by_job(records)
    assert "| driver | KILL | 1 | 0 | 0 | 0 | 0 | 0 | 0.0, 0.0 | 1 |" in by_signal(records)
    write_page(records, tmp_path / "page.md", "Made by hand.")
    page = (tmp_path / "page.md").read_text()
    assert "number 1, inline: hang: for ever" in page
    assert "Made by hand." in page
