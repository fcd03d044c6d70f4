"""Rank groups on a real local Ray: placed, used again, killed, and the video is the same in the end."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from rich.console import Console

from launch.cluster.cluster import Guard
from launch.cluster.group import Begun, End, Ended, Event, RankGroup, bundle_for
from launch.cluster.run import ATTEMPTS, run_on_ray
from launch.shell.exits import advising
from runtime.engine import Engine
from runtime.errors import BadRequestError, CancelledError, JobFailedError, NotFiniteError
from runtime.jobs.job import Job
from runtime.jobs.run import do_job
from runtime.reports.report import Report
from runtime.request.config import load_config
from runtime.sampling.denoise import StepRecord
from tests import jobs
from tests.jobs import PROMPT, overflowing

STEPS = 12
SMALL = {"width": 64, "height": 48, "frames": 5}

pytestmark = [pytest.mark.alone, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def make_job(folder: Path, **options: Any) -> Job:
    return jobs.make_job(folder / "a.mp4", **{"ranks": 2, "steps": STEPS, **options})


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """Digests of the frames that one rank makes, by preset and size; two ranks of cfg make the same bits."""
    known: dict[tuple[str, ...], list[str]] = {}

    def digests(spectrum: str, **size: int) -> list[str]:
        asked = (spectrum, *map(str, size.values()))
        if asked not in known:
            out = tmp_path_factory.mktemp("alone") / "a.mp4"
            job = jobs.make_job(out, spectrum=spectrum, steps=STEPS, checkpoint_every=0, **size)
            do_job(Engine(job.config), job)
            known[asked] = json.loads(out.with_suffix(".json").read_text())["frames_sha256"]
        return known[asked]

    return digests


@pytest.fixture
def mostly_forecast(tmp_path: Path) -> str:
    path = tmp_path / "mostly.yaml"
    path.write_text("schedule: {kind: explicit, computed: [0, 1, 2]}\n")
    return str(path)


def send(number: signal.Signals, rank: int) -> Callable[[RankGroup], None]:
    return lambda group: os.kill(group.places[rank]["pid"], number)


def run_with(
    job: Job,
    plan: list[tuple[Callable[[Event], bool], Callable[[RankGroup], None]]],
    attempts: int = ATTEMPTS,
) -> Report:
    """Run a job; the first thing in `plan` whose time has come happens, then the next."""
    left, ranks, told = list(plan), list[int](), list[Report]()

    def on_event(event: Event, group: RankGroup) -> None:
        ranks[:] = [place["pid"] for place in group.places]
        if left and left[0][0](event):
            left.pop(0)[1](group)

    def on_done(report: Report) -> None:
        """The job is done whether or not its ranks can be ended then."""
        assert all(psutil.pid_exists(pid) for pid in ranks)
        told.append(report)

    report = run_on_ray(job, Console(quiet=True), on_event, attempts, on_done=on_done)
    assert not left and told == [report]
    return report


def after(step: int) -> Callable[[Event], bool]:
    return lambda event: isinstance(event, StepRecord) and event.index == step


@pytest.mark.usefixtures("local_ray")
def test_a_rank_killed_while_writing_is_replaced(
    tmp_path: Path, undisturbed: Callable[..., list[str]]
) -> None:
    def kill_while_writing(group: RankGroup) -> None:
        """The mp4 is done, the picture is being drawn, and nothing has its name yet."""
        while not any(path.stat().st_size for path in tmp_path.glob(".a.*.part.json")):
            time.sleep(0.005)
        assert not (tmp_path / "a.mp4").exists()
        send(signal.SIGKILL, 0)(group)

    kills = [(lambda event: isinstance(event, Begun), kill_while_writing)]
    report = run_with(make_job(tmp_path, **SMALL), kills)
    assert report.frames_sha256 == undisturbed("paper", **SMALL)
    assert report.resumed_at == STEPS  # all that was left was to decode
    assert len(report.decision_digest) == 2 and len(set(report.decision_digest)) == 1
    assert report.topology.world == 2
    assert {path.name for path in tmp_path.iterdir()} == {"a.mp4", "a.json", "a.png"}


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_call_into_ray_that_fails_costs_a_group(
    tmp_path: Path, undisturbed: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ranks may be fine; the driver cannot know."""
    wait, broken = ray.wait, list[RankGroup]()

    def failing(*arguments: Any, **options: Any) -> Any:
        if broken:
            broken.clear()
            raise ray.exceptions.RaySystemError("the raylet does not answer")
        return wait(*arguments, **options)

    monkeypatch.setattr(ray, "wait", failing)
    report = run_with(make_job(tmp_path), [(after(3), broken.append)])
    assert report.frames_sha256 == undisturbed("paper")
    assert report.resumed_at > 0


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_ranks_killed_in_every_phase_and_one_that_stops_are_replaced(
    tmp_path: Path, undisturbed: Callable[..., list[str]], mostly_forecast: str
) -> None:
    def kill_while_decoding(group: RankGroup) -> None:
        """The last checkpoint is there, so the first rank decodes and writes."""
        while len(list(tmp_path.glob(f"*/*/manifest-{STEPS - 1:05d}-*"))) < 2:
            time.sleep(0.001)
        send(signal.SIGKILL, 0)(group)

    job = make_job(tmp_path, spectrum=mostly_forecast)
    events = [
        (after(1), send(signal.SIGKILL, 1)),  # a computed step
        (after(4), send(signal.SIGKILL, 1)),  # a forecast step
        (after(STEPS - 1), kill_while_decoding),
        (lambda event: isinstance(event, Begun), send(signal.SIGSTOP, 0)),
    ]
    report = run_with(job, events, attempts=5)
    assert report.frames_sha256 == undisturbed(mostly_forecast)
    assert report.resumed_at > 0


@pytest.mark.usefixtures("local_ray")
def test_a_group_serves_many_jobs_and_a_refused_one_does_no_harm(
    tmp_path: Path, undisturbed: Callable[..., list[str]]
) -> None:
    job = make_job(tmp_path, **SMALL)
    group = RankGroup(job)
    try:
        *events, ended = group.run(job)
        assert isinstance(events[0], Begun) and len(events) == 1 + STEPS
        assert report_of(ended).frames_sha256 == undisturbed("paper", **SMALL)

        refused = list(group.run(job))[-1]  # the video exists now
        assert isinstance(refused, Ended) and refused.end is End.REFUSED and "exists" in refused.reason

        again = list(group.run(job.retried()))[-1]
        assert report_of(again).frames_sha256 == undisturbed("paper", **SMALL)

        slow = replace(
            job.retried(), request=job.request.model_copy(update={"steps": 200, "spectrum": "off"})
        )
        stopped: list[Event | Ended] = []
        for event in group.run(slow):
            stopped.append(event)
            if isinstance(event, StepRecord):
                group.stop()
        assert isinstance(stopped[-1], Ended) and stopped[-1].end is End.CANCELLED
        assert "stopped after step" in stopped[-1].reason
        assert list((tmp_path / "a.checkpoints").glob("*/manifest-*"))
    finally:
        group.kill()


def report_of(ended: Event | Ended) -> Report:
    assert isinstance(ended, Ended) and ended.end is End.DONE, ended
    return Report.model_validate_json(ended.report)


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_job_that_kills_every_group_is_given_up(tmp_path: Path) -> None:
    kills = [(lambda event: isinstance(event, Begun), send(signal.SIGKILL, 0))] * 2
    with pytest.raises(JobFailedError, match=r"rank 0 .*\(attempt 2 of 2\)"):
        run_with(make_job(tmp_path, ranks=1, checkpoint_every=0), kills, attempts=2)


@pytest.mark.usefixtures("local_ray")
def test_more_ranks_than_the_cluster_has_room_for_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadRequestError, match=r"each takes 1 CPU, and the cluster has room for 4"):
        run_on_ray(make_job(tmp_path, ranks=5), Console(quiet=True))


@pytest.mark.usefixtures("local_ray")
def test_what_was_begun_by_a_lost_driver_fails_and_is_no_bad_request(tmp_path: Path) -> None:
    with pytest.raises(JobFailedError, match=r"the Ray driver process was lost; then ranks: 5 given"):
        run_on_ray(make_job(tmp_path, ranks=5), Console(quiet=True), again=True)


@pytest.mark.usefixtures("local_ray")
def test_a_step_that_is_not_finite_is_not_tried_again(tmp_path: Path) -> None:
    begun: list[Event] = []
    job = make_job(tmp_path, config=str(overflowing(tmp_path)), spectrum="off", ranks=1)
    with pytest.raises(NotFiniteError, match=r"^step 0: .*NaN or infinity") as caught, advising(job.advice):
        run_on_ray(job, Console(quiet=True), lambda event, group: begun.append(event))
    assert [type(event) for event in begun].count(Begun) == 1
    assert not hasattr(caught.value, "__notes__")


def node(cpus: float, gpus: float = 0, *, alive: bool = True) -> dict[str, Any]:
    return {"Alive": alive, "Resources": {"CPU": cpus, "GPU": gpus}}


@pytest.mark.parametrize(
    ("world", "nodes", "resources", "strategy"),
    [
        (8, [node(64, 8)] * 2, {"CPU": 1.0, "GPU": 1.0}, "STRICT_PACK"),
        (16, [node(64, 8)] * 2, {"CPU": 1.0, "GPU": 1.0}, "PACK"),
        (2, [node(2)], {"CPU": 1.0}, "STRICT_PACK"),
        (3, [node(2)] * 2, {"CPU": 1.0}, "PACK"),
        (9, [node(64, 8), node(64, 8, alive=False)], None, None),
    ],
)
def test_ranks_stay_on_one_node_when_they_fit(
    world: int, nodes: list[dict[str, Any]], resources: dict[str, float] | None, strategy: str | None
) -> None:
    config = load_config("wan-tiny")
    if resources is None:
        with pytest.raises(BadRequestError, match="room for 8"):
            bundle_for(config, world, nodes)
    else:
        bundle = bundle_for(config, world, nodes)
        assert (bundle.resources, bundle.strategy) == (resources, strategy)


@pytest.mark.slow
def test_a_killed_driver_leaves_what_a_new_one_goes_on_from(
    tmp_path: Path, undisturbed: Callable[..., list[str]]
) -> None:
    """Through the command, on a Ray that it starts and that ends with it."""
    options = ["--steps", str(STEPS), "--spectrum", "paper", "--out", str(tmp_path / "a.mp4")]
    command = [sys.executable, "-m", "launch", "generate", PROMPT, "--ranks", "2", "--compare", *options]
    command += ["--checkpoint-every", "1"]
    clean = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=clean) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "step 6/" in line:
                children = psutil.Process(process.pid).children(recursive=True)
                ranks = [child for child in children if "RankActor" in " ".join(child.cmdline())]
                process.kill()
                break
    assert len(ranks) == 2
    assert not psutil.wait_procs(ranks, timeout=30)[1]
    assert not (tmp_path / "a.mp4").exists()
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, check=True, env=clean)
    assert done.stdout == f"{tmp_path / 'a.mp4'}\n"
    report = json.loads((tmp_path / "a.json").read_text())
    assert report["frames_sha256"] == undisturbed("paper")
    assert report["quality"] is not None


def stick(actor: Any, *, at: int) -> None:
    """From step `at` on, let a rank's main thread be where nobody can tell it anything, as in C."""

    def install(self: Any) -> None:
        seen = self._step

        def step(record: StepRecord) -> None:
            seen(record)
            if record.index == at:
                threading.Event().wait()

        self._step = step

    ray.get(actor.__ray_call__.remote(install))


def fail(actor: Any, *, at: int) -> None:
    """Let a rank raise after step `at`."""

    def install(self: Any) -> None:
        def step(record: StepRecord) -> None:
            if record.index == at:
                raise MemoryError("CUDA out of memory")

        self._step = step

    ray.get(actor.__ray_call__.remote(install))


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("how", ["raises", pytest.param("is killed", marks=pytest.mark.slow)])
def test_a_rank_that_fails_while_the_other_is_stuck_is_named(how: str, tmp_path: Path) -> None:
    """The stuck one still answers questions, so nobody but the clock would end it."""
    job = make_job(tmp_path, cfg=2, **SMALL)
    group = RankGroup(job)
    try:
        stick(group._actors[0], at=3)
        if how == "raises":
            fail(group._actors[1], at=3)
        events = []
        for event in group.run(job):
            events.append(event)
            if how == "is killed" and isinstance(event, StepRecord) and event.index == 3:
                send(signal.SIGKILL, 1)(group)
        ended = events[-1]
        assert isinstance(ended, Ended) and ended.end is End.FAILED
        assert ("CUDA out of memory" if how == "raises" else "rank 1") in ended.reason
    finally:
        group.kill()


@pytest.mark.usefixtures("local_ray")
def test_a_group_that_is_not_wanted_any_more_does_not_start(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    with pytest.raises(CancelledError, match="stopped while the ranks were starting"):
        RankGroup(job, unwanted=lambda: True)


@pytest.mark.usefixtures("local_ray")
def test_what_cannot_be_loaded_is_refused_by_its_reason(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    nowhere = job.config.model_copy(update={"model": str(tmp_path / "nowhere")})
    with pytest.raises(BadRequestError, match="nowhere"):
        RankGroup(replace(job, config=nowhere))


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_signal_stops_the_group_and_leaves_a_checkpoint(tmp_path: Path) -> None:
    def interrupt(group: RankGroup) -> None:
        signal.raise_signal(signal.SIGTERM)

    job = make_job(tmp_path, steps=60, spectrum="off")
    with pytest.raises(CancelledError, match="stopped after step"):
        run_with(job, [(after(1), interrupt)])
    assert list((tmp_path / "a.checkpoints").glob("*/manifest-*"))


@pytest.mark.usefixtures("local_ray")
def test_workers_that_stop_before_they_are_ranks_are_replaced(tmp_path: Path) -> None:
    """Ray gives a rank to an idle worker, and would wait for one that is stopped for ever."""

    def tell() -> int:
        time.sleep(1)  # long enough for each call to have a worker of its own
        return os.getpid()

    lost: queue.SimpleQueue[str] = queue.SimpleQueue()
    guard = Guard(lost.put)
    try:
        workers = [psutil.Process(pid) for pid in ray.get([ray.remote(tell).remote() for _ in range(2)])]
        for worker in workers:
            worker.suspend()
        report = run_on_ray(make_job(tmp_path, **SMALL), Console(quiet=True))
        alive = psutil.wait_procs(workers, timeout=60)[1]  # others may have become the ranks
    finally:
        guard.end()
    assert report.nfe.cond and lost.empty() and not alive
