"""A short soak of the server; and that its checks would see what is wrong."""

from __future__ import annotations

import json
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from soak_checks import broken_promises, different_bits
from soak_clients import KINDS, Client, Outcome, kind_of
from soak_serve import FAULTS, Soak, main, table

from launch.serve.entries import State
from launch.serve.queue import Queue
from tests.serving import Api, listening, serving


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.timeout(1200)
def test_a_short_soak_keeps_every_promise_and_is_continued() -> None:
    with tempfile.TemporaryDirectory() as folder:  # a short name, as those of Ray's sockets are bounded
        words = ["--clients", "4", "--pause", "3", "--faults", "2", "--seed", "1", "--folder", folder]
        assert main([*words, "--jobs", "10"]) == 0
        log = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
        assert sorted(one["number"] for one in log if "number" in one) == list(range(10))
        assert main([*words, "--jobs", "16", "--out", str(Path(folder) / "out.md")]) == 0
        soak = Soak(Path(folder), 1)
        assert sorted(soak.outcomes) == list(range(16)) and soak.faults.total() > 0
        assert "Broken promises: 0." in (Path(folder) / "out.md").read_text()


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    with serving(tmp_path / "queue") as opened:
        yield opened


def accepted(api: Api, *ends: str) -> dict[str, str]:
    """Videos that have ended like this, as clients were told."""
    found = {}
    for end in ends:
        id = api.create()["id"]
        if end == "completed":
            api.finish()
            video = api.service.store.video(id)
            video.with_suffix(".json").touch()
            video.with_suffix(".png").touch()
        elif end == "deleted":
            assert api.client.delete(f"/v1/videos/{id}").status_code == 200
        else:
            api.finish(State(end), "as it were")
        found[id] = end
    return found


def test_a_queue_that_kept_its_promises_is_told_to(api: Api) -> None:
    told = accepted(api, "completed", "failed", "cancelled", "deleted")
    assert broken_promises(api.queue.folder, told) == []


def test_every_broken_promise_is_seen(api: Api) -> None:
    told = accepted(api, "completed", "failed", "cancelled", "completed")
    done, failed, _, other = told
    folder, results = api.queue.folder, api.queue.folder / "results"

    def seen(change: str, told: dict[str, str] = told) -> None:
        found = broken_promises(folder, told)
        assert len(found) == 1 and change in found[0], found

    unknown = api.create()["id"]
    api.finish(State.CANCELLED)
    seen(f"{unknown}: no client was told of it")
    told[unknown] = "cancelled"
    seen("video_lost: it has 0 requests", told | {"video_lost": "failed"})
    seen(f"{failed}: it is failed, and a client saw cancelled", told | {failed: "cancelled"})
    open_one = api.create()["id"]
    found = broken_promises(folder, told | {open_one: "deleted"})
    assert found == [
        f"{open_one}: it has not ended",
        f"{open_one}: it has ended 0 times",
        f"{open_one}: 0 events tell of its end",
    ]
    api.client.delete(f"/v1/videos/{open_one}")
    told[open_one] = "deleted"
    (results / done / "video.png").unlink()
    seen(f"{done}: it lacks video.png")
    (results / done / "video.png").touch()
    (results / other / "video.checkpoints").mkdir()
    seen(f"{other}: video.checkpoints was left")
    (results / other / "video.checkpoints").rmdir()
    (results / open_one).mkdir()
    seen(f"{open_one}: its folder was left")
    (results / open_one).rmdir()
    (folder / "previews").mkdir()
    (folder / "previews" / "1.webp").touch()
    seen("1.webp: a preview was left")


def test_frames_that_differ_are_seen() -> None:
    made = [("a", "one", "1"), ("a", "two", "1"), ("b", "three", "2"), ("b", "four", "2")]
    assert different_bits(made) == []
    assert different_bits([*made, ("a", "odd", "3")]) == [
        "odd: its frames differ from those of the same request"
    ]


def test_a_third_of_the_jobs_misbehaves_in_every_way() -> None:
    kinds = Counter(kind_of(number) for number in range(3 * len(KINDS)))
    assert kinds == {"plain": 2 * len(KINDS), **dict.fromkeys(KINDS, 1)}


def test_malformed_requests_are_refused_and_others_told_of(api: Api) -> None:
    with listening(api) as url:
        refused = [Client(url, seed).carry_out(0) for seed in range(40)]
        assert {one.kind for one in refused} == {"malformed"}
        assert all(one.end == "refused" and not one.problems for one in refused)
        assert api.queue.entries() == []


@pytest.mark.parametrize("kind", ["plain", "duplicated", "cancelled", "deleted", "broken", "gone"])
def test_each_kind_of_job_is_one_video_however_often_it_is_done(api: Api, kind: str) -> None:
    """The server's pool is this test; a job that is done again after an interruption is the same."""
    [number, *_] = [number for number in range(18) if kind_of(number) == kind]
    with listening(api) as url:
        client = Client(url, seed=0)
        first = _carried_out(api, client, number)
        assert not first.problems and len(first.accepted) == 1
        again = _carried_out(api, client, number)
        assert (again.end, again.accepted, again.problems) == (first.end, first.accepted, [])
        assert len(api.queue.entries()) == 1


def _carried_out(api: Api, client: Client, number: int) -> Outcome:
    """Carry out a job while this test does what a replica would, with a failure that is allowed."""
    over = threading.Event()

    def serve() -> None:
        while not over.wait(0.1):
            if api.queue.count()[State.WAITING]:
                api.finish(State.FAILED, "stopped after it crashed 2 rank groups")

    served = threading.Thread(target=serve)
    if kind_of(number) not in ("cancelled", "deleted"):
        served.start()
    outcome = client.carry_out(number)
    over.set()
    if served.ident is not None:
        served.join()
    return outcome


def test_a_job_that_fails_for_another_reason_is_a_broken_promise(api: Api) -> None:
    with listening(api) as url, ThreadPoolExecutor(1) as pool:
        job = pool.submit(Client(url, seed=0).carry_out, 1)
        while not api.queue.count()[State.WAITING]:
            assert not job.done()
        api.finish(State.FAILED, "it was lost")
        [problem] = job.result().problems
        assert "has failed: generation_failed, it was lost" in problem


def test_the_table_counts_jobs_by_kind_and_end(tmp_path: Path) -> None:
    lines = [
        {"number": 0, "kind": "plain", "end": "completed", "accepted": ["video_0"]},
        {"number": 1, "kind": "cancelled", "end": "cancelled", "accepted": ["video_1"]},
        {"fault": FAULTS[0], "at": 0.0},
        {"seconds": 12.5},
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    soak = Soak(tmp_path, 0)
    told = table(soak, ["something is wrong"])
    assert "| 1 plain | 1 | 0 | 0 | 0 | 0 |" in told and "| 1 cancelled | 0 | 1 | 0 | 0 | 0 |" in told
    assert "2 jobs, 2 videos, 12 s. Faults: server 1," in told
    assert "Broken promises: 1.\n- something is wrong" in told
    with closing(Queue(tmp_path / "queue")):
        assert any("requests" in problem for problem in soak.problems())
