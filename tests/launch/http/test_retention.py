"""What is kept and for how long, and that nothing else is left."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from launch.http.joining import Joiner
from launch.http.retention import Sweeper
from launch.serve.entries import State
from tests.serving import SMALL, error_of, serving


def test_an_expired_video_goes_with_its_files(tmp_path: Path) -> None:
    with serving(tmp_path / "queue", keep=0.0) as api:
        done, waiting = api.create()["id"], api.create()["id"]
        api.finish()
        assert api.video(done)["expires_at"] <= time.time() + 1
        Sweeper(api.service).sweep()
        assert error_of(api.client.get(f"/v1/videos/{done}"))[1] == "video_not_found"
        assert not api.service.store.video(done).parent.exists()
        assert api.video(waiting)["status"] == "queued"


def test_nothing_is_removed_before_its_time(tmp_path: Path) -> None:
    with serving(tmp_path / "queue") as api:
        done, failed = api.create()["id"], api.create()["id"]
        api.finish()
        api.finish(State.FAILED, "rank 0 died")
        stray = api.service.store.video("video_" + "0" * 32)
        stray.parent.mkdir()
        Sweeper(api.service).sweep()
        assert api.client.get(f"/v1/videos/{done}/content").status_code == 200
        assert api.video(failed)["status"] == "failed"
        assert stray.parent.exists()  # it may be of a request that is just being made
        foreign = stray.parent.with_name("mine")
        foreign.mkdir()
        for folder in (stray.parent, foreign):
            os.utime(folder, (0, 0))
        Sweeper(api.service).sweep()
        assert not stray.parent.exists() and foreign.exists()


def test_what_others_put_beside_results_stays(tmp_path: Path) -> None:
    """The queue's folder is its user's: nothing in it is removed but what Lockstep wrote, by name."""
    with serving(tmp_path / "queue") as api:
        done = api.create()["id"]
        api.finish()
        video = api.service.store.video(done)
        stray = video.parent.with_name("video_" + "0" * 32)
        linked = video.parent.with_name("film_" + "0" * 32)
        mine, elsewhere = tmp_path / "mine", tmp_path / "mine" / "video.mp4"
        mine.mkdir()
        elsewhere.write_text("mine")
        linked.symlink_to(mine)
        left = video.with_name(".video.some-host.1.0123abcd.part.mp4")  # of a process that was killed
        left.touch()
        kept = [folder / name for folder in (video.parent, stray) for name in ("notes.txt", "video.mov")]
        stray.mkdir()
        for path in kept:
            path.write_text("mine")
        os.utime(stray, (0, 0))
        os.utime(linked, (0, 0), follow_symlinks=False)
        api.client.delete(f"/v1/videos/{done}")
        Sweeper(api.service).sweep()
        assert set(video.parent.parent.glob("video_*/*")) == set(kept)
        assert linked.is_symlink() and elsewhere.read_text() == "mine"


def test_a_shot_is_kept_until_its_film_is_joined(tmp_path: Path) -> None:
    with serving(tmp_path / "queue", keep=0.0) as api:
        old = api.create()["id"]
        api.finish()
        shots = [{"video_id": old}, {**SMALL, "prompt": "a blue square"}]
        film = api.client.post("/v1/films", json={"title": "x", "shots": shots}).json()["id"]
        Sweeper(api.service).sweep()
        assert api.video(old)["status"] == "completed"
        api.finish()
        Joiner(api.service).join()
        assert api.client.get(f"/v1/films/{film}").json()["status"] == "completed"
        Sweeper(api.service).sweep()
        assert error_of(api.client.get(f"/v1/videos/{old}"))[1] == "video_not_found"


def test_a_deleted_running_video_keeps_its_folder_until_its_ranks_have_stopped(tmp_path: Path) -> None:
    with serving(tmp_path / "queue") as api:
        id = api.create()["id"]
        entry = api.queue.take(0)
        assert entry is not None
        folder = api.service.store.video(id).parent
        folder.mkdir(parents=True)
        os.utime(folder, (0, 0))
        api.client.delete(f"/v1/videos/{id}")
        Sweeper(api.service).sweep()
        assert folder.exists()
        api.queue.end(entry.id, State.CANCELLED, "cancelled")
        Sweeper(api.service).sweep()
        assert not folder.exists()


def test_deleted_videos_are_forgotten_when_no_quota_counts_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(tmp_path / "queue") as api:
        first = api.create()["id"]
        api.client.post(f"/v1/videos/{first}/cancel")
        api.client.post(f"/v1/videos/{first}/resume")
        ids = [first, *(api.create()["id"] for _ in range(2))]
        headers = {"Idempotency-Key": "one"}
        api.client.post("/v1/videos", json=SMALL, headers=headers)
        for id in ids:
            api.client.delete(f"/v1/videos/{id}")
        Sweeper(api.service).sweep()
        assert len(api.queue.entries()) == 5
        now = time.time()
        monkeypatch.setattr("launch.http.records.time.time", lambda: now + 7200)
        Sweeper(api.service).sweep()
        assert [entry.id for entry in api.queue.entries()] == [5]
        assert not any(api.queue.history(id) for id in range(1, 5))
        monkeypatch.setattr("launch.http.records.time.time", lambda: now + 100_000)
        Sweeper(api.service).sweep()
        monkeypatch.undo()
        again = api.client.post("/v1/videos", json=SMALL, headers=headers)
        assert "Idempotent-Replayed" not in again.headers
        assert api.queue.entries()[-1].id == 6  # no number is given twice


def test_an_image_is_kept_while_a_video_may_be_made_from_it(tmp_path: Path) -> None:
    with serving(tmp_path / "queue") as api:
        store = api.service.store
        for digest in ("a" * 64, "b" * 64):
            store.image(digest).parent.mkdir(exist_ok=True)
            store.image(digest).write_bytes(b"png")
            os.utime(store.image(digest), (0, 0))
        id = api.create()["id"]
        with api.queue.transaction() as base:
            base.execute("UPDATE videos SET image = ? WHERE id = ?", ("a" * 64, id))
        Sweeper(api.service).sweep()
        assert store.image("a" * 64).exists() and not store.image("b" * 64).exists()
