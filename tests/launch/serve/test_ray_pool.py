"""A pool of replicas on a real local Ray: groups die, requests are set aside, and each ends once."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import ray
import torch
from safetensors.torch import save_file

from launch import cli
from launch.cluster.group import Begun, Ended, Event, RankGroup
from launch.cluster.metrics import DriverMetrics
from launch.commands.queue import how_to_resume
from launch.film.shots import plan_film
from launch.serve.entries import Entry, State
from launch.serve.pool import Replica, ReplicaPool
from launch.serve.queue import Queue
from runtime.errors import JobFailedError
from runtime.request.config import EMBEDDED_MODELS, load_config
from runtime.sampling.denoise import StepRecord
from tests.jobs import PROMPT, TINY, make_job, overflowing
from tests.kills import killed_between_files
from tests.launch.commands.test_lora_option import write as write_lora
from tests.places import ROOT

pytestmark = [pytest.mark.alone, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_metrics_report_interval_ms", "500")
        ray.init(
            address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR"
        )
    yield
    ray.shutdown()


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[Queue]:
    with closing(Queue(tmp_path / "queue")) as opened:
        yield opened


def kill(group: RankGroup) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(group.places[-1]["pid"], signal.SIGKILL)


def show_until(metrics: DriverMetrics, seen: Callable[[], bool]) -> None:
    """Ray exports a gauge only when it was set lately, so it is set until it was seen."""
    deadline = time.monotonic() + 60
    while not seen() and time.monotonic() < deadline:
        metrics.progress(0, TINY["steps"], 0.0)
        time.sleep(0.1)


def states(queue: Queue) -> dict[str, State]:
    return {entry.name: entry.state for entry in queue.entries()}


def digest(path: Path) -> list[str]:
    told: list[str] = json.loads(path.with_suffix(".json").read_text())["frames_sha256"]
    return told


@contextlib.contextmanager
def scraped() -> Iterator[set[str]]:
    """Names of the metrics that Prometheus would find meanwhile."""
    node, names, over = ray.nodes()[0], set[str](), threading.Event()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"

    def scrape() -> None:
        while not over.wait(0.3):
            with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:
                names.update(re.findall(r"^ray_lockstep_\w+", answer.read().decode(), re.MULTILINE))

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        yield names
    finally:
        over.set()
        thread.join()


@pytest.mark.usefixtures("local_ray")
def test_a_poisoned_request_is_set_aside_and_the_next_one_runs(queue: Queue, tmp_path: Path) -> None:
    long = {**TINY, "steps": 80, "spectrum": "off"}
    for name in ("good", "poisoned", "refused", "also-good"):
        settings = long if name == "poisoned" else TINY
        queue.submit(make_job(tmp_path / f"{name}.mp4", **settings), name=name)
    (tmp_path / "refused.mp4").touch()
    poison, kills, pids = [], list[int](), set()

    def on_event(entry: Entry, event: Event | Ended, group: RankGroup) -> None:
        pids.add(group.places[0]["pid"])
        if entry.name == "also-good" and isinstance(event, Begun):
            again = make_job(tmp_path / "poisoned.mp4", **long, resume=True)
            queue.submit(again, name="as advised")
        if entry.name == "also-good" and isinstance(event, Ended):
            # Its ranks are there still, and so are their metrics.
            show_until(pool.metrics, lambda: shown <= metrics)
        if entry.name == "poisoned" and isinstance(event, StepRecord) and len(poison) < entry.tries:
            poison.append(event.index)
            kill(group)

    dashboard = (ROOT / "configs" / "grafana" / "lockstep.json").read_text()
    shown = set(re.findall(r"ray_lockstep_\w+", dashboard))
    with scraped() as metrics:
        pool = ReplicaPool(
            queue, 1, on_event, look=lambda: kills.append(queue.entry(2).kills), advice=how_to_resume
        )
        pool.run()
    assert states(queue) == {
        "good": State.DONE,
        "poisoned": State.FAILED,
        "refused": State.FAILED,
        "also-good": State.DONE,
        "as advised": State.DONE,
    }
    assert len(poison) == 2 and len(pids) == 3
    assert shown <= metrics
    set_aside, refused = queue.entry(2), queue.entry(3)
    assert set_aside.reason.startswith(
        "stopped after it crashed 2 rank groups; the last failure: rank 0 died"
    )
    assert "'" + str(tmp_path / "refused.mp4") + "' exists" in refused.reason and refused.kills == 0
    assert digest(tmp_path / "good.mp4") == digest(tmp_path / "also-good.mp4")
    assert [s for s, _, _ in queue.history(2)] == ["waiting", "running", "waiting", "running", "failed"]
    assert queue.replicas() == []
    assert kills == [0, 1]  # Ray is looked at before a request is blamed
    kept = str(tmp_path / "poisoned.checkpoints")
    assert set_aside.reason.endswith(
        f"; its checkpoints are kept in {kept!r}: the same `lockstep queue add` with --resume and another "
        "--name resumes from the last"
    )
    assert "checkpoints are kept" not in refused.reason
    assert json.loads((tmp_path / "poisoned.json").read_text())["resumed_at"] > 0


@pytest.mark.usefixtures("local_ray")
def test_a_request_that_fitted_before_is_not_too_large_now(
    queue: Queue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nodes are lost, not the request; one that never fitted fails."""
    monkeypatch.setattr("launch.serve.replica.BACKOFF", 0.01)
    for name in ("fitted", "never"):
        queue.submit(make_job(tmp_path / f"{name}.mp4", **TINY, ranks=5), name=name)
    queue.take(0)
    with pytest.raises(
        JobFailedError, match=r"no replica is left: .*nodes of the cluster are lost: ranks: 5"
    ):
        ReplicaPool(queue, 1).run()
    assert states(queue) == {"fitted": State.WAITING, "never": State.WAITING}
    queue.cancel(1)
    ReplicaPool(queue, 1).run()
    assert queue.entry(2).state is State.FAILED and "has room for 4" in queue.entry(2).reason


@pytest.mark.usefixtures("local_ray")
def test_a_replica_switches_loras_and_starts_no_other_ranks(queue: Queue, tmp_path: Path) -> None:
    lora, pids = write_lora(tmp_path / "it.safetensors"), set[int]()
    for order, (name, given) in enumerate(
        {"plain": [], "styled": [{"file": lora, "scale": 0.1}], "again": []}.items()
    ):
        job = make_job(tmp_path / f"{name}.mp4", **TINY, ranks=2, lora=given)
        queue.submit(job.planned(), name=name, priority=-order)
    ReplicaPool(queue, 1, lambda entry, event, group: pids.update(one["pid"] for one in group.places)).run()
    assert states(queue) == dict.fromkeys(("plain", "styled", "again"), State.DONE)
    assert len(pids) == 2  # one for each rank
    made = [digest(tmp_path / f"{name}.mp4") for name in ("plain", "styled", "again")]
    assert made[0] == made[2] != made[1]
    reports = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("plain", "styled", "again")]
    assert [[one["file"] for one in told["model"]["loras"]] for told in reports] == [[], [lora], []]


@pytest.mark.usefixtures("local_ray")
def test_a_request_is_served_from_another_folder_than_it_was_added_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a config that names a model and a LoRA beside it, and relative --spectrum and --out."""
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    (home / "own").mkdir(parents=True)
    elsewhere.mkdir()
    shutil.copytree(EMBEDDED_MODELS / "wan-tiny", home / "own/tiny")
    name = "transformer.blocks.0.attn1.to_q"
    weights = {f"{name}.lora_A.weight": torch.ones(2, 192), f"{name}.lora_B.weight": torch.ones(192, 2)}
    save_file(weights, home / "own/it.safetensors")
    config = load_config("wan-tiny").model_dump(mode="json", exclude={"model", "lora"}, exclude_none=True)
    own = {**config, "model": "tiny", "lora": [{"file": "it.safetensors", "scale": 0.01}]}
    (home / "own/own.yaml").write_text(json.dumps(own))
    shutil.copy(ROOT / "configs/spectrum/paper.yaml", home / "mine.yaml")
    size = ["--size", "64x48", "--frames", "5", "--steps", "4", "--max-sequence-length", "32"]
    made = ["--config", "own/own.yaml", "--spectrum", "mine.yaml", *size]
    monkeypatch.chdir(home)
    assert cli.run(["generate", PROMPT, *made, "--out", "direct.mp4"]) == 0
    assert cli.run(["queue", "add", PROMPT, *made, "--out", "queued.mp4", "--queue", "../queue"]) == 0
    monkeypatch.chdir(elsewhere)
    with closing(Queue(Path("../queue"))) as opened:
        ReplicaPool(opened, 1).run()
        assert [(entry.state, entry.reason) for entry in opened.entries()] == [(State.DONE, "")]
    assert digest(home / "queued.mp4") == digest(home / "direct.mp4")
    assert not list(elsewhere.iterdir())


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_what_was_killed_between_its_files_is_gone_on_with(queue: Queue, tmp_path: Path) -> None:
    """After the last step, with the report there and the video not: as a request, as one that is added with
    --resume, and as a shot of a film."""
    board = tmp_path / "film.yaml"
    board.write_text(
        "title: One\nwidth: 64\nheight: 48\ndefaults: {steps: 4, spectrum: paper, frames: 5}\n"
        f"shots:\n  - {{id: one, prompt: {PROMPT}}}\n"
    )
    (tmp_path / "film" / "shots").mkdir(parents=True)
    shot = plan_film(board, out=tmp_path / "film").job(0)
    jobs = {name: make_job(tmp_path / f"{name}.mp4", **TINY).absolute() for name in ("killed", "again", "b")}
    for job in (jobs["killed"], jobs["again"], shot):
        killed_between_files(job)
    for job in (jobs["killed"], shot):
        queue.submit(job)
        assert queue.take(0) is not None  # its server was killed, too
    queue.submit(make_job(tmp_path / "again.mp4", **TINY, resume=True).absolute())
    queue.submit(jobs["b"])
    ReplicaPool(queue, 1).run()
    assert set(states(queue).values()) == {State.DONE}, [entry.reason for entry in queue.entries()]
    told = [json.loads(job.outputs.report.read_text()) for job in (jobs["b"], *list(jobs.values())[:2], shot)]
    assert [report["resumed_at"] for report in told] == [0, 4, 4, 4]
    for field in ("frames_sha256", "decision_digest"):
        assert all(report[field] == told[0][field] for report in told[:3])
    assert told[3]["frames_sha256"] and len(told[3]["decision_digest"]) == 1


@pytest.mark.usefixtures("local_ray")
def test_a_request_that_is_not_finite_fails_at_once(queue: Queue, tmp_path: Path) -> None:
    config = str(overflowing(tmp_path))
    queue.submit(make_job(tmp_path / "bad.mp4", **TINY, config=config), name="bad")
    queue.submit(make_job(tmp_path / "good.mp4", **TINY), name="good")
    ReplicaPool(queue, 1).run()
    assert states(queue) == {"bad": State.FAILED, "good": State.DONE}
    bad = queue.entries()[0]
    assert (bad.tries, bad.kills) == (1, 0) and bad.reason.startswith("step 0: "), bad


@pytest.mark.usefixtures("local_ray")
def test_a_request_that_takes_ray_down_is_set_aside(queue: Queue, tmp_path: Path) -> None:
    queue.submit(make_job(tmp_path / "bad.mp4", **TINY), name="bad")
    for _ in range(2):
        queue.take(0)
        with queue.served(lost=True):
            pass
    ReplicaPool(queue, 1).run(again=True)
    (bad,) = queue.entries()
    assert bad.state is State.FAILED and bad.reason.startswith("stopped after it crashed 2 rank groups")


def test_a_late_answer_of_the_queue_stops_nobody_else(queue: Queue, tmp_path: Path) -> None:
    """The replica has gone on to the next request before the queue says that the last is cancelled."""
    for name in ("first", "second"):
        queue.submit(make_job(tmp_path / f"{name}.mp4", **TINY), name=name)

    class Late(Queue):
        def find(self, id: int) -> Entry | None:
            found = super().find(id)
            replica._entry = following
            return found

    with closing(Late(queue.folder)) as late:
        replica = Replica(0, late, ReplicaPool(late, 1), lambda *_: None)
        replica._entry, following = late.take(0), late.take(0)
        assert replica._entry is not None and following is not None
        queue.cancel(replica._entry.id)
        replica.look()
        assert not replica._unwanted
        queue.cancel(following.id)
        replica.look()
        assert replica._unwanted == "cancelled"


def test_a_request_that_is_forgotten_as_it_ends_stops_nobody(queue: Queue, tmp_path: Path) -> None:
    """Whoever keeps the results deletes one while its replica still notes that it is idle."""
    for name in ("first", "second"):
        queue.submit(make_job(tmp_path / f"{name}.mp4", **TINY), name=name)
    pool = ReplicaPool(queue, 1)
    (replica,) = pool._replicas
    replica._entry = queue.take(0)
    queue.end(1, State.DONE)
    with queue.transaction() as base:
        assert queue.forget_in(base, 1)
    pool._look()
    assert not replica._unwanted and not pool.ending


@pytest.mark.parametrize("error", [RuntimeError("a bug"), SystemExit("a bug")])
def test_a_pool_that_cannot_see_to_deadlines_any_more_ends_and_says_so(
    error: BaseException, queue: Queue
) -> None:
    class Broken(Queue):
        def expire(self) -> None:
            raise error

    with closing(Broken(queue.folder)) as broken:
        with pytest.raises(
            JobFailedError, match=rf"deadlines and .* cannot be enforced: {type(error).__name__}: a bug"
        ) as caught:
            ReplicaPool(broken, 1).run(keep=True)
        assert str(caught.value).endswith("; the remaining requests wait in the queue")


def test_a_replica_never_ends_in_silence(queue: Queue, tmp_path: Path) -> None:
    """Ray's bindings may end a thread with SystemExit; the queue is not done because of that."""

    class Ending(Queue):
        def take(self, replica: int, loaded: str = "") -> Entry | None:
            raise SystemExit(1)

    queue.submit(make_job(tmp_path / "a.mp4", **TINY))
    failed = pytest.raises(JobFailedError, match="replica 0: SystemExit: 1; the remaining requests wait")
    with closing(Ending(queue.folder)) as ending, failed:
        ReplicaPool(ending, 1).run()


@pytest.mark.usefixtures("local_ray")
def test_what_is_cancelled_or_late_ends_after_a_step_and_its_group_goes_on(
    queue: Queue, tmp_path: Path
) -> None:
    long = {**TINY, "steps": 1000, "spectrum": "off"}
    queue.submit(make_job(tmp_path / "unwanted.mp4", **long), name="unwanted")
    queue.submit(make_job(tmp_path / "late.mp4", **long), name="late", seconds=3600)
    queue.submit(make_job(tmp_path / "next.mp4", **TINY), name="next")
    pids: dict[int | None, set[int]] = {0: set(), 1: set()}

    def on_event(entry: Entry, event: Event | Ended, group: RankGroup) -> None:
        pids[entry.replica].add(group.places[0]["pid"])
        if isinstance(event, StepRecord) and event.index == 2:
            if entry.name == "unwanted":
                queue.cancel(entry.id)
            elif entry.name == "late":
                pass_deadline(queue, entry.id)

    ReplicaPool(queue, 2, on_event).run()
    assert states(queue) == {"unwanted": State.CANCELLED, "late": State.CANCELLED, "next": State.DONE}
    assert queue.entry(1).reason.startswith("cancelled; stopped after step")
    assert queue.entry(2).reason.startswith("its deadline passed; stopped after step")
    assert queue.entry(1).progress.steps == 1000 and queue.entry(1).progress.nfe > 2
    assert [len(seen) for seen in pids.values()] == [1, 1]


def pass_deadline(queue: Queue, id: int) -> None:
    change(queue, f"UPDATE requests SET deadline = 1 WHERE id = {id}")


@pytest.mark.usefixtures("local_ray")
def test_what_goes_wrong_beside_the_ranks_costs_one_request_at_most(queue: Queue, tmp_path: Path) -> None:
    """A listener that raises, one whose reader has gone, a request of another version, and a model that is
    gone when its turn comes: the others are done, and no replica waits for what nobody works on."""
    names = ("broken", "unreadable", "unheard", "old", "good", "also-good")
    long = {**TINY, "steps": 1000, "spectrum": "off"}  # its ranks are not done before the pool ends them
    for name in names:
        options = long if name == "broken" else TINY
        queue.submit(make_job(tmp_path / f"{name}.mp4", **options), name=name)
    change(queue, "UPDATE requests SET job = '{}' WHERE name = 'old'")
    missing = str(tmp_path / "nowhere")
    change(
        queue,
        "UPDATE requests SET job = json_set(job, '$.config.model', ?) WHERE name = ?",
        missing,
        names[1],
    )

    def on_event(entry: Entry, event: Event | Ended, group: RankGroup) -> None:
        if entry.name == "broken" and isinstance(event, StepRecord):
            raise RuntimeError("a bug")
        if entry.name == "unheard":
            raise BrokenPipeError

    ReplicaPool(queue, 2, on_event).run()
    assert states(queue) == dict(
        zip(names, ("failed", "failed", "done", "failed", "done", "done"), strict=True)
    )
    tries = {entry.name: (entry.tries, entry.kills) for entry in queue.entries()}
    assert tries == dict.fromkeys(names, (1, 0)) | {"broken": (2, 1)}
    assert "unexpected failure: RuntimeError: a bug" in queue.entry(1).reason
    assert "nowhere" in queue.entry(2).reason
    assert "a job of another version" in queue.entry(4).reason


@pytest.mark.usefixtures("local_ray")
def test_a_queue_that_is_locked_for_a_while_is_waited_for(queue: Queue, tmp_path: Path) -> None:
    """Its pool goes on, and sees to cancelled requests afterwards."""
    queue.submit(make_job(tmp_path / "a.mp4", **TINY), name="a")
    queue.submit(make_job(tmp_path / "unwanted.mp4", **{**TINY, "steps": 1000, "spectrum": "off"}), name="b")
    queue._base.execute("PRAGMA busy_timeout = 50")
    with closing(sqlite3.connect(queue.folder / "queue.sqlite", check_same_thread=False)) as other:

        def on_event(entry: Entry, event: Event | Ended, group: RankGroup) -> None:
            if entry.name == "a" and isinstance(event, Begun):
                other.execute("BEGIN EXCLUSIVE")
            elif entry.name == "a" and isinstance(event, Ended):
                threading.Timer(1.0, other.rollback).start()
            elif entry.name == "b" and isinstance(event, StepRecord) and event.index == 2:
                queue.cancel(entry.id)

        ReplicaPool(queue, 1, on_event).run()
    assert states(queue) == {"a": State.DONE, "b": State.CANCELLED}


def change(queue: Queue, statement: str, *values: str) -> None:
    with closing(sqlite3.connect(queue.folder / "queue.sqlite", isolation_level=None)) as base:
        base.execute(statement, values)


def serve_killed_at_random(
    queue: Queue, folder: Path, requests: int, kills: int, seed: int
) -> Counter[tuple[str, str]]:
    """Put `requests` of all kinds in the queue and serve them on 2 replicas; how each kind ended."""
    chance = random.Random(seed)
    deadly = {f"poisoned-{number}" for number in range(max(1, requests // 60))}
    names = [f"good-{number}" for number in range(requests - len(deadly) - 2 * (requests // 20))]
    names += [f"{kind}-{number}" for kind in ("refused", "unwanted") for number in range(requests // 20)]
    names += sorted(deadly)
    chance.shuffle(names)
    for name in names:
        out = folder / f"{name}.mp4"
        if name.startswith("refused"):
            out.touch()
        steps = 1000 if name.startswith("unwanted") else TINY["steps"]
        job = make_job(out, **{**TINY, "steps": steps, "seed": len(name) % 3})
        queue.submit(job, name=name, owner=chance.choice("abc"), priority=chance.choice((0, 0, 1)))
    unlucky = set(chance.sample([name for name in names if name.startswith("good")], kills))
    lock = threading.Lock()

    def on_event(entry: Entry, event: Event | Ended, group: RankGroup) -> None:
        if isinstance(event, Ended):
            return
        with lock:
            die = entry.name in deadly or entry.name in unlucky
            unlucky.discard(entry.name)
        if die:
            threading.Timer(chance.random() * 0.2, kill, [group]).start()
            time.sleep(0.25 if isinstance(event, Begun) else 0)
        if entry.name.startswith("unwanted"):
            queue.cancel(entry.id)

    ReplicaPool(queue, 2, on_event).run()
    for entry in queue.entries():
        told = [state for state, _, _ in queue.history(entry.id)]
        assert told[-1] is entry.state and told[0] is State.WAITING
        assert sum(state in (State.DONE, State.FAILED, State.CANCELLED) for state in told) == 1
        assert (entry.state is State.DONE) == (entry.reason == "")
        if entry.state is State.DONE:  # one that failed may have files, too: killed between them and its end
            assert (folder / f"{entry.name}.json").exists()
            assert not entry.job.checkpoints or not entry.job.checkpoints.root.exists()
    return Counter((entry.name.split("-")[0], str(entry.state)) for entry in queue.entries())


def one_digest_per_seed(queue: Queue) -> bool:
    found: dict[int, set[str]] = {}
    for entry in queue.entries(State.DONE):
        found.setdefault(entry.job.request.seed, set()).update(digest(entry.job.outputs.video))
    return all(len(digests) == 1 for digests in found.values())


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.usefixtures("local_ray")
def test_two_hundred_requests_end_once_each_whatever_dies(queue: Queue, tmp_path: Path) -> None:
    ended = serve_killed_at_random(queue, tmp_path, requests=200, kills=20, seed=4)
    assert sum(ended.values()) == 200
    assert ended["poisoned", "failed"] == 3
    assert ended["refused", "failed"] == ended["unwanted", "cancelled"] == 10
    # One that is killed by chance is not at fault, but two groups are two groups.
    assert ended["good", "done"] + ended["good", "failed"] == 177 and ended["good", "done"] > 170
    assert one_digest_per_seed(queue)


@pytest.mark.slow
def test_a_killed_and_a_stopped_pool_lose_nothing(queue: Queue, tmp_path: Path) -> None:
    """Through the command, on a Ray that it starts and that ends with it."""
    for number in range(3):
        job = make_job(tmp_path / f"{number}.mp4", **{**TINY, "steps": 200, "spectrum": "off"})
        queue.submit(job, name=str(number))
    command = [sys.executable, "-m", "launch", "queue", "run", "--queue", str(queue.folder)]
    clean = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    for tries, number in enumerate((signal.SIGKILL, signal.SIGTERM), start=1):
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=clean) as pool:
            wait_for_step(queue, pool, tries)
            pool.send_signal(number)
            code = pool.wait(60)
        assert code == (130 if number == signal.SIGTERM else -9)
    assert State.RUNNING not in states(queue).values()
    subprocess.run(command, check=True, env=clean, capture_output=True)
    assert set(states(queue).values()) == {State.DONE}
    assert len({tuple(digest(tmp_path / f"{number}.mp4")) for number in range(3)}) == 1
    assert sum(entry.tries for entry in queue.entries()) == 5


def wait_for_step(queue: Queue, pool: subprocess.Popen[str], tries: int) -> None:
    """Wait until the first request, begun so often, has done a step and not all of them."""
    while True:
        entry = queue.entry(1)
        if entry.tries == tries and 2 <= entry.progress.step <= 150:
            return
        assert pool.poll() is None
        time.sleep(0.02)
