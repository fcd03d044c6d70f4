"""Previews on a real local Ray: what is made is shown meanwhile, on two ranks, and never afterwards."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import ray
from PIL import Image

from launch.cluster.run import run_on_ray
from launch.serve.entries import State
from launch.serve.pool import ReplicaPool
from launch.serve.previews import RequestPreviews
from launch.serve.queue import Queue
from launch.serve.status import tables
from launch.shell.terminal import Terminal
from runtime.engine import Engine
from runtime.jobs.run import do_job
from runtime.media.preview import encode_preview
from runtime.reports.report import Report
from tests.jobs import make_job
from tests.runtime.media.test_preview import frames

STEPS = {"width": 64, "height": 48, "frames": 5, "max_sequence_length": 32, "steps": 12, "spectrum": "off"}

pytestmark = [pytest.mark.alone, pytest.mark.timeout(240), pytest.mark.usefixtures("local_ray")]


@pytest.fixture(scope="module")
def local_ray(cache_folder: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache_folder))
        ray.init(
            address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR"
        )
        yield
        ray.shutdown()


@contextmanager
def watched(look: Callable[[], None]) -> Iterator[None]:
    """Look again and again while the block runs, and once more."""
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            look()
            time.sleep(0.02)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def sizes(path: Path, into: set[tuple[int, int]]) -> None:
    """The size of the preview that is there now, if there is one; whatever is there is whole."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return
    with Image.open(io.BytesIO(content)) as picture:
        picture.seek(getattr(picture, "n_frames", 1) - 1)
        picture.load()
        into.add(picture.size)


def test_a_job_shows_what_it_makes_and_leaves_nothing(tmp_path: Path, engine: Engine) -> None:
    shown, seen = tmp_path / "shown.webp", set[tuple[int, int]]()
    plain = do_job(engine, make_job(tmp_path / "a.mp4", **STEPS))
    assert isinstance(plain, Report)
    job = make_job(tmp_path / "b.mp4", ranks=2, preview=shown, **STEPS)
    with watched(lambda: sizes(shown, seen)):
        report = run_on_ray(job, Terminal(stderr=True))
    assert seen == {(64, 48)}
    assert not shown.exists()
    assert report.frames_sha256 == plain.frames_sha256
    assert plain.preview is None
    assert report.preview is not None and report.preview.count > 0


def test_a_pool_keeps_a_preview_of_each_running_request(tmp_path: Path) -> None:
    left, foreign = tmp_path / "queue" / "previews" / "7.webp", tmp_path / "queue" / "previews" / "8.webp"
    left.parent.mkdir(parents=True)
    left.write_bytes(encode_preview(frames(), 0.1))  # of a pool that was killed
    foreign.write_bytes(b"a user's")
    told, seen = set[str](), set[tuple[int, int]]()
    with closing(Queue(tmp_path / "queue")) as queue:
        long = STEPS | {"steps": 48}  # on a busy machine the table is drawn seldom
        id = queue.submit(make_job(tmp_path / "a.mp4", **long))
        path = RequestPreviews(queue.folder).of(id).path

        def look() -> None:
            sizes(path, seen)
            console = Terminal(stderr=True, width=400, file=io.StringIO())
            for table in tables(queue, [State.RUNNING]):
                console.print(table)
            told.update(word for word in console.file.getvalue().split() if word.endswith(".webp"))  # type: ignore[attr-defined]

        with watched(look):
            ReplicaPool(queue, 1, previews=True).run()
        ended = queue.entry(id)
    assert ended.state is State.DONE and ended.progress.preview == ""
    assert seen == {(64, 48)} and told == {str(path)}
    assert list(left.parent.iterdir()) == [foreign]
    assert json.loads((tmp_path / "a.json").read_text())["preview"]["count"] > 0


def test_a_full_disk_costs_previews_and_no_video(tmp_path: Path) -> None:
    """The folder of previews cannot be made, as on a disk without room for it."""
    with closing(Queue(tmp_path / "queue")) as queue:
        (tmp_path / "queue" / "previews").write_text("in the way")
        id = queue.submit(make_job(tmp_path / "a.mp4", **STEPS))
        ReplicaPool(queue, 1, previews=True).run()
        assert queue.entry(id).state is State.DONE
    assert (tmp_path / "queue" / "previews").read_text() == "in the way"
