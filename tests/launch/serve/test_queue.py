"""The queue: who is next, what outlives a process, and that a request ends once."""

from __future__ import annotations

import itertools
import json
import os
import sqlite3
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from launch import cli
from launch.commands.queue import _cores
from launch.serve.entries import Progress, ReplicaEntry, RunEvent, State
from launch.serve.kinds import group_of, kind_of
from launch.serve.queue import Queue, QueueError
from runtime.errors import BadRequestError
from tests.forked import Command
from tests.jobs import PROMPT, make_job
from tests.launch.commands.test_lora_option import write as write_lora


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[Queue]:
    with closing(Queue(tmp_path / "queue")) as opened:
        yield opened


def add(queue: Queue, name: str, **options: object) -> int:
    job = make_job(Path(f"/nowhere/{name}.mp4"))
    return queue.submit(job, name=name, **options)  # type: ignore[arg-type]


def connect(queue: Queue) -> sqlite3.Connection:
    return sqlite3.connect(queue.folder / "queue.sqlite", isolation_level=None)


def taken(queue: Queue, replica: int = 0, loaded: str = "") -> str:
    entry = queue.take(replica, loaded)
    return "" if entry is None else entry.name


def test_the_first_to_come_is_the_first_to_go_and_priority_goes_first(queue: Queue) -> None:
    for name, priority in (("a", 0), ("b", 0), ("urgent", 5), ("last", -1)):
        add(queue, name, priority=priority)
    assert [taken(queue) for _ in range(5)] == ["urgent", "a", "b", "last", ""]


def test_owners_share_the_replicas(queue: Queue) -> None:
    """However many requests one of them has."""
    for number in range(4):
        add(queue, f"many-{number}", owner="many")
    add(queue, "one", owner="few")
    assert taken(queue, 0) == "many-0"
    assert taken(queue, 1) == "one"
    assert taken(queue, 2) == "many-1"


def test_who_has_used_more_of_late_comes_later(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, owner in (("a", "glutton"), ("b", "glutton"), ("c", "other")):
        add(queue, name, owner=owner)
    first = queue.take(0)
    assert first is not None and first.name == "a"
    now = time.time()
    monkeypatch.setattr("launch.serve.queue.time.time", lambda: now + 60)
    queue.end(first.id, State.DONE)
    assert taken(queue) == "c"


def test_a_replica_prefers_what_it_has_loaded(queue: Queue) -> None:
    two = make_job(Path("/nowhere/two.mp4"), ranks=2)
    queue.submit(two, name="two")
    add(queue, "one")
    assert kind_of(two) != kind_of(make_job(Path("/nowhere/other.mp4")))
    assert kind_of(make_job(Path("/a/b.mp4"), seed=3)) == kind_of(make_job(Path("/c/d.mp4")))
    assert taken(queue, loaded=kind_of(make_job(Path("/nowhere/one.mp4")))) == "one"


def test_requests_with_other_loras_run_on_the_same_ranks(queue: Queue, tmp_path: Path) -> None:
    """Those that need no switch come first; then what the group can run; then others."""
    one, two = (write_lora(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    plain, styled, other = (
        make_job(tmp_path / f"{number}.mp4", lora=[{"file": file, "scale": 0.5}] if file else [])
        for number, file in enumerate(("", one, two))
    )
    assert len({group_of(job) for job in (plain, styled, other)}) == 1
    assert len({kind_of(job) for job in (plain, styled, other)}) == 3
    queue.submit(make_job(tmp_path / "3.mp4", ranks=2), name="of other ranks")
    for name, job in (("plain", plain), ("other", other), ("styled", styled)):
        queue.submit(job, name=name)
    assert [taken(queue, loaded=kind_of(styled)) for _ in range(4)] == [
        "styled", "plain", "other", "of other ranks",
    ]  # fmt: skip
    shown = {entry.name: entry.loras for entry in queue.entries()}
    assert shown == {"of other ranks": "", "plain": "", "other": "two × 0.5", "styled": "one × 0.5"}


def test_a_job_comes_out_as_it_went_in(queue: Queue, tmp_path: Path) -> None:
    job = make_job(tmp_path / "a.mp4", ranks=4, cfg=2, ring=2, seed=2**63 - 1, steps=9)
    queue.submit(job)
    entry = queue.take(0)
    assert entry is not None and entry.job == job and entry.name == "request-1"


def test_a_request_ends_once(queue: Queue) -> None:
    id = add(queue, "a")
    queue.take(0)
    queue.end(id, State.DONE)
    for state in (State.DONE, State.FAILED, State.CANCELLED):
        with pytest.raises(RuntimeError, match="has ended already"):
            queue.end(id, state)
    with pytest.raises(RuntimeError, match="has ended already"):
        queue.put_back(id, "", killed=True)
    queue.cancel(id)
    assert [state for state, _, _ in queue.history(id)] == [State.WAITING, State.RUNNING, State.DONE]
    with closing(connect(queue)) as base, pytest.raises(sqlite3.IntegrityError):
        base.execute("INSERT INTO history VALUES (?, 'failed', '', 0)", (id,))


def test_a_request_is_a_part_of_a_larger_transaction_or_not_there(queue: Queue) -> None:
    job = make_job(Path("/nowhere/a.mp4"))
    with pytest.raises(BadRequestError, match="no"), queue.transaction() as base:
        queue.insert(base, job, name="a")
        raise BadRequestError("no")
    assert queue.entries() == [] and queue.last_event() == 0
    with queue.transaction() as base:
        id = queue.insert(base, job, name="a")
        queue.cancel_in(base, id)
    assert queue.entry(id).state is State.CANCELLED


def test_events_have_one_order_and_outlive_the_pool(queue: Queue) -> None:
    one, two = add(queue, "one"), add(queue, "two")
    queue.take(0)
    steps = [RunEvent("begun", {"label": "x"}), RunEvent("step", {"step": 1})]
    queue.report(one, Progress("x", 1, 4, 1), steps)
    queue.end(one, State.FAILED, "why")
    with closing(Queue(queue.folder)) as other:
        rows = other.read(tuple, "SELECT request, kind, told FROM events ORDER BY seq")
        assert other.last_event() == len(rows)
    assert [(request, kind) for request, kind, _ in rows] == [
        (one, "state"), (two, "state"), (one, "state"), (one, "begun"), (one, "step"), (one, "state"),
    ]  # fmt: skip
    assert json.loads(rows[-1][2]) == {"state": "failed", "reason": "why"}


def test_what_is_forgotten_gives_its_number_to_nobody(queue: Queue) -> None:
    ids = [add(queue, name) for name in "abc"]
    queue.take(0)
    for id in ids[1:]:
        queue.cancel(id)
    with queue.transaction() as base:
        assert [queue.forget_in(base, id) for id in ids] == [False, True, False]  # runs; is gone; is the last
    assert [entry.id for entry in queue.entries()] == [ids[0], ids[2]]
    assert queue.history(ids[1]) == []
    assert queue.read(tuple, "SELECT * FROM events WHERE request = ?", ids[1]) == []
    assert add(queue, "b") == ids[2] + 1  # its file is free, and its name


def test_two_threads_never_take_the_same(queue: Queue) -> None:
    for number in range(40):
        add(queue, str(number))
    names: list[list[str]] = [[], [], [], []]

    def take_all(mine: list[str]) -> None:
        while name := taken(queue):
            mine.append(name)

    threads = [threading.Thread(target=take_all, args=(mine,)) for mine in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(itertools.chain(*names)) == sorted(str(number) for number in range(40))


def test_a_server_that_died_leaves_nothing_running(tmp_path: Path) -> None:
    with closing(Queue(tmp_path)) as queue:
        add(queue, "a")
        queue.take(0)
        queue.show_replica(ReplicaEntry(0, "working", [], 0))
    with closing(Queue(tmp_path)) as queue, queue.served():
        assert queue.count()[State.WAITING] == 1 and queue.replicas() == []
        entry = queue.take(0)
        assert entry is not None and entry.tries == 2 and entry.kills == 0


def test_a_lost_ray_counts_against_what_was_running(tmp_path: Path) -> None:
    with closing(Queue(tmp_path)) as queue:
        for name in ("running", "waiting"):
            add(queue, name)
        queue.take(0)
    with closing(Queue(tmp_path)) as queue, queue.served(lost=True):
        assert {entry.name: entry.kills for entry in queue.entries()} == {"running": 1, "waiting": 0}
        assert queue.history(1)[-1][:2] == (State.WAITING, "the Ray driver process was lost")


def test_only_the_request_that_is_to_blame_for_lost_rays_is_set_aside(queue: Queue) -> None:
    """One of three that run takes Ray down; the three then run alone, one after another."""

    def lose_ray() -> dict[str, int]:
        with queue.served(lost=True):
            return {entry.name: entry.kills for entry in queue.entries()}

    for name in ("good", "bad", "also good"):
        add(queue, name)
    assert [taken(queue) for _ in range(3)] == ["good", "bad", "also good"]
    assert lose_ray() == {"good": 0, "bad": 0, "also good": 0}
    add(queue, "urgent", priority=1)
    assert [taken(queue), taken(queue)] == ["urgent", ""]
    queue.end(4, State.DONE)
    assert [taken(queue), taken(queue)] == ["good", ""]
    queue.end(1, State.DONE)
    assert [taken(queue), taken(queue)] == ["bad", ""]
    assert lose_ray() == {"good": 0, "bad": 2, "also good": 0, "urgent": 0}
    assert [taken(queue), taken(queue)] == ["bad", ""]
    queue.end(2, State.FAILED)
    add(queue, "last")
    assert [taken(queue), taken(queue)] == ["also good", ""]
    queue.end(3, State.DONE)
    add(queue, "beside it")
    assert [taken(queue), taken(queue)] == ["last", "beside it"]


def test_a_request_with_too_many_ranks_costs_the_others_nothing() -> None:
    here = len(os.sched_getaffinity(0))
    assert _cores([1, 1000 * here, 2], 2) == 4
    assert _cores([1000 * here], 3) == 3


def test_one_queue_has_one_server(queue: Queue) -> None:
    with queue.served(), closing(Queue(queue.folder)) as other:
        said = f"another pool serves .*process {os.getpid()}"
        with pytest.raises(BadRequestError, match=said), other.served():
            pass
        add(other, "added meanwhile")
    assert taken(queue) == "added meanwhile"


def test_a_queue_that_is_served_is_refused_before_ray_is_started(
    queue: Queue, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "nowhere")  # which is looked at first of all there
    with queue.served():
        assert cli.run(["queue", "run", "--queue", str(queue.folder)]) == 2
    said = capsys.readouterr().err
    assert "another pool serves" in said and "RAY_ADDRESS" not in said


def test_cancelled_and_late_requests_end(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    waits, runs, late = add(queue, "waits"), add(queue, "runs", priority=1), add(queue, "late", seconds=5)
    assert taken(queue) == "runs"
    queue.cancel(waits)
    queue.cancel(runs)
    now = time.time()
    monkeypatch.setattr("launch.serve.queue.time.time", lambda: now + 6)
    queue.expire()
    assert (queue.entry(waits).state, queue.entry(waits).reason) == (
        State.CANCELLED,
        "cancelled while it waited",
    )
    assert queue.entry(runs).state is State.RUNNING and queue.entry(runs).unwanted
    assert (queue.entry(late).state, queue.entry(late).reason) == (
        State.CANCELLED,
        "its deadline passed while it waited",
    )
    with pytest.raises(BadRequestError, match="request: 99 given; the queue has no request"):
        queue.cancel(99)


@pytest.mark.parametrize("lost", ["rank", "pool"])
def test_a_cancelled_request_whose_ranks_are_lost_does_not_wait_for_new_ones(queue: Queue, lost: str) -> None:
    id = add(queue, "a")
    queue.take(0)
    queue.cancel(id)
    if lost == "rank":
        queue.put_back(id, "rank 0 died", killed=True)
    else:
        with queue.served():
            pass
    entry = queue.entry(id)
    assert entry.state is State.CANCELLED and entry.reason.startswith("cancelled; ")
    assert queue.take(0) is None


def test_numbers_of_events_go_on_when_the_last_was_forgotten(queue: Queue) -> None:
    first = add(queue, "a")
    add(queue, "b")
    queue.take(0)
    queue.end(first, State.DONE)
    last = queue.last_event()
    with queue.transaction() as base:
        assert queue.forget_in(base, first)
    assert queue.last_event() == last == 4


def test_a_name_is_used_once(queue: Queue) -> None:
    add(queue, "a")
    with pytest.raises(BadRequestError, match="name: 'a' given; the queue has a request of this name"):
        add(queue, "a")
    assert queue.count()[State.WAITING] == 1


def test_a_job_of_another_version_is_refused(queue: Queue) -> None:
    id = add(queue, "a")
    with closing(connect(queue)) as base:
        base.execute("UPDATE requests SET job = '{\"model\": 1}'")
    with pytest.raises(BadRequestError, match="a job of another version: config: missing"):
        _ = queue.entry(id).job


def test_something_else_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "queue.sqlite").write_text("this is a text " * 100)
    with pytest.raises(BadRequestError, match=r"queue: cannot use .*not a database"):
        Queue(tmp_path)


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = ["--queue", str(tmp_path / "queue")]
    out = ["--out", str(tmp_path / "a.mp4")]
    assert cli.run(["queue", "add", PROMPT, *here, *out, "--owner", "me", "--priority", "3"]) == 0
    assert capsys.readouterr().out == "1\n"
    assert cli.run(["queue", "add", PROMPT, *here, *out]) == 2
    assert f"out: '{tmp_path / 'a.mp4'}' given; request-1 will write it" in capsys.readouterr().err
    assert cli.run(["queue", "add", "", *here]) == 2
    assert "prompt: '' given; must not be empty" in capsys.readouterr().err

    with closing(Queue(tmp_path / "queue")) as queue:
        queue.take(0)
        queue.report(1, Progress("paper, seed 0", 7, 50, 6, 75.0))
        places = [{"rank": r, "host": "node-a", "device": f"cuda:{r}", "pid": 1} for r in range(2)]
        queue.show_replica(ReplicaEntry(0, "working", places, 4))
        assert cli.run(["status", *here]) == 0
        shown = capsys.readouterr().out
        for word in ("request-1", "me", "running", "7/50", "1:15 min left"):
            assert word in shown
        assert "0 (cuda:0), 1 (cuda:1) on node-a" in shown
        assert cli.run(["status", *here, "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["requests"][0]["progress"]["step"] == 7
        assert told["requests"][0]["text"]["request"]["prompt"] == PROMPT
        assert cli.run(["queue", "cancel", "1", "7", *here]) == 2  # nothing was started
        assert "request: 7 given; the queue has no request of this number" in capsys.readouterr().err
        assert not queue.entry(1).unwanted
        assert cli.run(["queue", "cancel", "1", *here]) == 0
        assert queue.entry(1).unwanted


def test_the_status_of_an_empty_queue_is_said(queue: Queue, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["status", "--queue", str(queue.folder)]) == 0
    counts = "0 waiting, 0 running, 0 done, 0 failed, 0 cancelled"
    assert capsys.readouterr().out == f"{counts}\nno replicas\n"


def test_a_queue_is_watched_only_while_somebody_listens(queue: Queue) -> None:
    pipe = subprocess.PIPE
    with Command(["status", "--watch", "--queue", str(queue.folder)], stdout=pipe, stderr=pipe) as watch:
        assert watch.stdout is not None and watch.stderr is not None
        assert watch.stdout.readline()
        watch.stdout.close()
        assert (watch.wait(60), watch.stderr.read()) == (0, "")


def test_a_queue_that_is_not_there_is_not_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["status"], ["queue", "run"], ["queue", "cancel", "1"]):
        assert cli.run([*command, "--queue", str(tmp_path / "none")]) == 2
        assert "there is no queue" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_names_are_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever looks like markup in a name is shown as it is, to everybody."""
    here = ["--queue", str(tmp_path / "queue")]
    for number, name in enumerate(("[/a] first", "[bold]second")):
        out = ["--out", str(tmp_path / f"[b]{number}.mp4")]
        assert cli.run(["queue", "add", PROMPT, *here, *out, "--name", name, "--owner", "[red]me"]) == 0
    with closing(Queue(tmp_path / "queue")) as queue:
        queue.take(0)
        queue.put_back(1, "it [/failed]", killed=True)
    assert cli.run(["status", *here]) == 0
    shown = capsys.readouterr().out
    for text in ("[/a] first", "[bold]second", "[red]me", "it [/failed]"):
        assert text in shown


def test_status_tells_what_is_made_and_cancel_what_has_ended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.run(["queue", "add", "a circle " * 20, "--out", "sub/a.mp4"]) == 0
    assert cli.run(["status"]) == 0
    shown = capsys.readouterr().out
    assert "a circle a circle" in shown and "…" in shown and "sub/a.mp4" in shown
    assert cli.run(["queue", "cancel", "1"]) == 0
    assert capsys.readouterr().err == ""
    assert cli.run(["queue", "cancel", "1"]) == 0
    said = "request 1 is cancelled already: it and its files are not changed\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    "options",
    [
        ["--name", ""],
        ["--name", "two\nlines"],
        ["--name", "\udcff"],
        ["--owner", "\x1b[31m"],
        ["--priority", "99999999999999999999"],
        ["--expires", "inf"],
        ["--expires", "nan"],
        ["--expires", "1e300"],
    ],
)
def test_what_cannot_be_kept_is_refused(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = ["--queue", str(tmp_path / "queue")]
    Queue(tmp_path / "queue").close()
    assert cli.run(["queue", "add", PROMPT, *here, "--out", str(tmp_path / "a.mp4"), *options]) == 2
    said = capsys.readouterr().err
    assert options[0].removeprefix("--") in said and "Traceback" not in said
    assert cli.run(["status", *here]) == 0


def test_a_file_is_written_by_one_request(queue: Queue, tmp_path: Path) -> None:
    """Whatever name it goes by: another way to its folder, a number of several videos, a report's picture."""
    (tmp_path / "link").symlink_to(tmp_path)
    queue.submit(make_job(tmp_path / "a-1.mp4"), name="first")
    same = [
        make_job(tmp_path / "link" / "a-1.mp4"),
        make_job(tmp_path / "a.mp4", videos=2),
        make_job(tmp_path / "b.mp4", report=tmp_path / "x" / ".." / "a-1.json"),
    ]
    for job in same:
        with pytest.raises(BadRequestError, match=r"out: .* given; first will write it"):
            queue.submit(job)
    queue.cancel(1)
    queue.submit(same[0])


def test_a_commit_that_fails_leaves_the_queue_as_it_was(queue: Queue) -> None:
    """A disk that is full, as SQLite sees it: no page can be added."""
    add(queue, "a")
    pages = queue._base.execute("PRAGMA page_count").fetchone()[0]
    queue._base.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(QueueError, match=r"queue: cannot write .*queue\.sqlite'?: database or disk is full"):
        add(queue, "long", owner="x" * 200)
        for number in range(100):
            add(queue, f"b{number}")
    queue._base.execute("PRAGMA max_page_count = 1000000")
    add(queue, "c")
    assert {"a", "c"} <= {entry.name for entry in queue.entries()}


def test_a_reader_that_does_not_let_go_does_no_lasting_harm(queue: Queue) -> None:
    add(queue, "a")
    queue._base.execute("PRAGMA busy_timeout = 50")
    with closing(connect(queue)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM requests").fetchone()
        with pytest.raises(QueueError, match="database is locked"):
            add(queue, "b")
    add(queue, "b")
    assert [entry.name for entry in queue.entries()] == ["a", "b"]


def test_a_request_of_another_version_stops_nobody(
    queue: Queue, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add(queue, "old")
    with closing(connect(queue)) as base:
        base.execute("UPDATE requests SET job = '{\"model\": 1}'")
    here = ["--queue", str(queue.folder)]
    assert cli.run(["queue", "add", PROMPT, *here, "--out", str(tmp_path / "a.mp4")]) == 0
    assert cli.run(["status", *here]) == 0
    assert "old" in capsys.readouterr().out
    with pytest.raises(BadRequestError, match="old: a job of another version"):
        _ = queue.entry(1).job


def test_a_user_without_a_name_has_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 4711")

    monkeypatch.setattr("getpass.getuser", nobody)
    here = ["--queue", str(tmp_path / "queue"), "--out", str(tmp_path / "a.mp4")]
    assert cli.run(["queue", "add", PROMPT, *here]) == 0
    with closing(Queue(tmp_path / "queue")) as queue:
        assert queue.entry(1).owner == f"uid-{os.getuid()}"


def test_a_folder_that_is_not_utf_8_is_not_taken_for_a_damaged_queue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert cli.run(["queue", "add", PROMPT]) == 2
    assert "a path of the job is not UTF-8 and cannot be kept in a queue" in capsys.readouterr().err


def test_a_file_that_is_not_the_queues_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("the key to the garden")
    refused = pytest.raises(BadRequestError, match=r"queue: .*lock' is not Lockstep's")
    with closing(Queue(tmp_path)) as queue, refused, queue.served():
        pass
    assert (tmp_path / "lock").read_text() == "the key to the garden"
    (tmp_path / "lock").unlink()
    (tmp_path / "empty").touch()
    (tmp_path / "lock").symlink_to("empty")
    with closing(Queue(tmp_path)) as queue, refused, queue.served():
        pass
    assert (tmp_path / "empty").read_text() == ""


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE requests SET state = 'eaiting'",
        "UPDATE requests SET progress = '{'",
        "UPDATE requests SET progress = '7'",
        "UPDATE requests SET name = x'ff'",
        "UPDATE requests SET deadline = 'x'",
        "INSERT INTO replicas VALUES (0, 'idle', '[', 0)",
    ],
)
def test_a_damaged_row_is_said_in_one_line(
    change: str, queue: Queue, capsys: pytest.CaptureFixture[str]
) -> None:
    add(queue, "a")
    with closing(connect(queue)) as base:
        base.execute("PRAGMA ignore_check_constraints = ON")
        base.execute(change)
    assert cli.run(["status", "--queue", str(queue.folder)]) == 3
    said = capsys.readouterr().err
    assert "queue.sqlite' is damaged" in " ".join(said.split()) and "Traceback" not in said


def test_a_job_that_is_none_is_shown_as_it_is(queue: Queue, capsys: pytest.CaptureFixture[str]) -> None:
    add(queue, "a")
    with closing(connect(queue)) as base:
        base.execute("UPDATE requests SET job = 'x'")
    assert cli.run(["status", "--json", "--queue", str(queue.folder)]) == 0
    assert json.loads(capsys.readouterr().out)["requests"][0]["text"] == "x"


def test_a_database_of_others_is_refused_and_stays(tmp_path: Path) -> None:
    path = tmp_path / "queue.sqlite"
    with closing(sqlite3.connect(path)) as base:
        base.execute("CREATE TABLE requests (id INTEGER)")
    before = path.read_bytes()
    with pytest.raises(BadRequestError, match=r"queue.sqlite' is not a queue's; choose another folder"):
        Queue(tmp_path)
    assert path.read_bytes() == before
