"""`/v1/films`: storyboards whose shots become videos, all or none, and one film in the end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.http.joining import Joiner
from launch.http.retention import Sweeper
from launch.serve.entries import State
from runtime.film.assemble import join_film
from runtime.media.frames import read_frames
from tests.serving import SMALL, Api, error_of, serving

COMMON = {key: value for key, value in SMALL.items() if key != "prompt"}
FADE = {"kind": "crossfade", "frames": 2}


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    with serving(tmp_path / "queue") as opened:
        yield opened


def ask(api: Api, *shots: dict[str, Any], **fields: Any) -> Any:
    return api.client.post("/v1/films", json={"title": "Shapes", **COMMON, **fields, "shots": [*shots]})


def film(api: Api, id: str) -> dict[str, Any]:
    told: dict[str, Any] = api.client.get(f"/v1/films/{id}").json()
    return told


def test_shots_become_videos_and_these_one_film(api: Api) -> None:
    there = api.create()["id"]
    api.finish()
    made = ask(
        api,
        {"prompt": "a red circle", "seed": 1, "title": "First"},
        {"video_id": there, "transition": FADE},
        {"prompt": "a blue square", "frames": 9, "steps": 3},
    ).json()
    assert (made["object"], made["status"], made["size"]) == ("film", "in_progress", "64x48")
    assert [shot["title"] for shot in made["shots"]] == ["First", "a red circle", "a blue square"]
    assert [shot["start"] for shot in made["shots"]] == [0.0, 3 / 8, 1.0]  # 5 frames, 2 of them shared, 5, 9
    assert made["seconds"] == "2.125" and made["progress"] == 33
    one, last = (api.video(made["shots"][number]["video_id"]) for number in (0, 2))
    assert one["film_id"] == made["id"] and one["request"]["seed"] == 1 and one["request"]["steps"] == 4
    assert last["request"]["frames"] == 9 and last["request"]["steps"] == 3
    joiner, content = Joiner(api.service), f"/v1/films/{made['id']}/content"
    joiner.join()
    assert error_of(api.client.get(content))[:2] == (400, "film_not_ready")
    api.finish()
    assert film(api, made["id"])["status"] == "in_progress"
    api.finish()
    assert film(api, made["id"])["progress"] == 99
    joiner.join()
    done = film(api, made["id"])
    assert done["status"] == "completed" and done["progress"] == 100 and done["expires_at"]
    answer = api.client.get(content)
    assert (
        answer.headers["content-type"] == "video/mp4"
        and "Shapes.mp4" in answer.headers["content-disposition"]
    )
    assert len(read_frames(api.service.store.film(made["id"]) / "film.mp4")) == 17
    for variant in ("thumbnail", "spritesheet"):
        assert api.client.get(f"{content}?variant={variant}").headers["content-type"] == "image/png"


@pytest.mark.parametrize(
    ("shots", "fields", "param"),
    [
        ([], {}, "shots"),
        ([{"prompt": "x"}] * 201, {}, "shots"),
        ([{}], {}, "shots.0"),
        ([{"prompt": "x", "video_id": "video_0"}], {}, "shots.0"),
        ([{"prompt": "x", "promt": "x"}], {}, "shots.0.promt"),
        ([{"prompt": "x"}, {"prompt": "y", "frames": 6}], {}, "shots.1.frames"),
        ([{"prompt": "x"}, {"prompt": "y", "spectrum": "nothing"}], {}, "shots.1.spectrum"),
        ([{"prompt": "x"}, {"prompt": "y", "size": "64x64"}], {}, "shots.1"),
        ([{"prompt": "x"}, {"prompt": "y", "fps": 9}], {}, "shots.1"),
        ([{"prompt": "x", "transition": FADE}], {}, "shots.0"),
        ([{"prompt": "x"}, {"prompt": "y", "transition": FADE | {"frames": 5}}], {}, "shots.0"),
        ([{"prompt": "x"}], {"title": "a\nb"}, "title"),
    ],
)
def test_what_cannot_become_a_film_is_refused_whole(
    api: Api, shots: list[dict[str, Any]], fields: dict[str, Any], param: str
) -> None:
    answer = ask(api, *shots, **fields)
    assert answer.status_code == 400 and error_of(answer)[2] == param, answer.text
    assert api.queue.entries() == [] and api.client.get("/v1/films").json()["data"] == []


def test_a_shot_that_is_not_there_is_named(api: Api) -> None:
    answer = ask(api, {"prompt": "x"}, {"video_id": "video_0"})
    assert error_of(answer) == (404, "video_not_found", "shots.1.video_id")


def test_a_shots_own_budget_replaces_the_films(api: Api) -> None:
    whole = {"size": None, "frames": None, "steps": None, "spectrum": "paper"}
    made = ask(api, {"prompt": "x", "nfe": 10}, {"prompt": "y", "seconds": 1}, **whole).json()
    requests = [api.video(shot["video_id"])["request"] for shot in made["shots"]]
    assert [one["spectrum"] for one in requests] == ["fitted-wan-tiny-10", "paper"]
    assert [one["frames"] for one in requests] == [17, 9]


def test_quotas_hold_for_all_shots_together(tmp_path: Path) -> None:
    with serving(tmp_path / "queue", queued=2) as api:
        assert error_of(ask(api, *[{"prompt": "x"}] * 3))[:2] == (429, "queue_full")
        assert api.queue.entries() == []
        assert ask(api, *[{"prompt": "x"}] * 2).status_code == 200


def test_a_film_that_fails_says_why_and_can_be_resumed(api: Api) -> None:
    made = ask(api, {"prompt": "x"}, {"prompt": "y"}).json()["id"]
    joiner = Joiner(api.service)
    api.finish(State.FAILED, "rank 0 died")
    api.finish()
    joiner.join()
    failed = film(api, made)
    assert failed["status"] == "failed" and failed["error"]["message"] == "shot 1: rank 0 died"
    assert error_of(api.client.get(f"/v1/films/{made}/content"))[:2] == (400, "film_failed")
    assert api.client.post(f"/v1/films/{made}/resume").json()["status"] == "in_progress"
    joiner.join()
    api.finish()
    joiner.join()
    assert film(api, made)["status"] == "completed"
    assert error_of(api.client.post(f"/v1/films/{made}/resume"))[:2] == (400, "film_not_resumable")


def test_a_film_is_resumed_whole_or_not_at_all(tmp_path: Path) -> None:
    with serving(tmp_path / "queue", queued=2) as api:
        twice = api.create()["id"]
        made = ask(api, {"video_id": twice}, {"prompt": "x"}, {"video_id": twice}).json()["id"]
        api.client.post(f"/v1/films/{made}/cancel")
        Joiner(api.service).join()
        other = api.create()["id"]
        resume = f"/v1/films/{made}/resume"
        assert error_of(api.client.post(resume))[:2] == (429, "queue_full")
        assert api.video(twice)["status"] == "failed" and film(api, made)["status"] == "failed"
        api.client.delete(f"/v1/videos/{other}")
        assert api.client.post(resume).json()["status"] == "queued"
        assert api.queue.count()[State.WAITING] == 2
        api.client.post(f"/v1/films/{made}/cancel")
        Joiner(api.service).join()
        api.client.delete(f"/v1/videos/{twice}")
        assert error_of(api.client.post(resume))[:2] == (400, "film_not_resumable")


def test_a_repeated_film_is_made_once(api: Api) -> None:
    def send(title: str) -> Any:
        body = {"title": title, **COMMON, "shots": [{"prompt": "x"}]}
        return api.client.post("/v1/films", json=body, headers={"Idempotency-Key": "one"})

    first, second = send("Shapes"), send("Shapes")
    assert first.json()["id"] == second.json()["id"] and len(api.queue.entries()) == 1
    assert [one.headers.get("Idempotent-Replayed") for one in (first, second)] == [None, "true"]
    assert error_of(send("Others"))[:2] == (422, "idempotency_key_reused")
    of_video = api.client.post("/v1/videos", json=SMALL, headers={"Idempotency-Key": "one"})
    assert error_of(of_video)[:2] == (422, "idempotency_key_reused")


def test_an_unexpected_error_fails_one_film_and_not_the_next(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, other = (ask(api, {"prompt": "x"}, title=title).json()["id"] for title in ("bad", "good"))
    api.finish()
    api.finish()

    def join(*parts: Any, title: str, **options: Any) -> None:
        if title == "bad":
            raise ZeroDivisionError("a fault of ours")
        join_film(*parts, title=title, **options)

    monkeypatch.setattr("launch.http.joining.join_film", join)
    Joiner(api.service).join()
    assert "a fault of ours" in film(api, made)["error"]["message"]
    assert film(api, other)["status"] == "completed"


def test_a_cancelled_film_has_failed(api: Api) -> None:
    made = ask(api, {"prompt": "x"}, {"prompt": "y"}).json()["id"]
    api.client.post(f"/v1/films/{made}/cancel")
    Joiner(api.service).join()
    told = film(api, made)
    assert told["status"] == "failed" and told["error"]["code"] == "cancelled"
    assert "cancelled" in told["error"]["message"]
    assert api.queue.count()[State.WAITING] == 0


def test_damaged_shots_fail_the_film_alone(api: Api) -> None:
    made, other = (ask(api, {"prompt": "x"}).json() for _ in range(2))
    api.finish()
    api.finish()
    api.service.store.video(made["shots"][0]["video_id"]).write_bytes(b"")
    Joiner(api.service).join()
    assert (
        film(api, made["id"])["status"] == "failed" and "ffmpeg" in film(api, made["id"])["error"]["message"]
    )
    assert film(api, other["id"])["status"] == "completed"


def test_a_deleted_film_leaves_its_videos(api: Api) -> None:
    made = ask(api, {"prompt": "x"}).json()
    api.finish()
    Joiner(api.service).join()
    folder = api.service.store.film(made["id"])
    assert folder.is_dir()
    assert api.client.delete(f"/v1/films/{made['id']}").json()["deleted"]
    assert error_of(api.client.get(f"/v1/films/{made['id']}"))[:2] == (404, "film_not_found")
    Sweeper(api.service).sweep()
    assert not folder.exists()
    assert api.video(made["shots"][0]["video_id"])["status"] == "completed"


def test_films_have_pages_and_expire(tmp_path: Path) -> None:
    with serving(tmp_path / "queue", keep=0.0) as api:
        ids = [ask(api, {"prompt": "x"}).json()["id"] for _ in range(3)]
        page = api.client.get("/v1/films?limit=2").json()
        assert [one["id"] for one in page["data"]] == [ids[2], ids[1]] and page["has_more"]
        rest = api.client.get(f"/v1/films?after={page['last_id']}").json()
        assert [one["id"] for one in rest["data"]] == [ids[0]] and not rest["has_more"]
        api.finish()
        Joiner(api.service).join()
        Sweeper(api.service).sweep()
        assert [one["id"] for one in api.client.get("/v1/films").json()["data"]] == [ids[2], ids[1]]


def test_a_video_that_was_deleted_fails_the_film_that_needs_it(api: Api) -> None:
    made = ask(api, {"prompt": "x"}, {"prompt": "y"}).json()
    api.finish()
    api.client.delete(f"/v1/videos/{made['shots'][0]['video_id']}")
    api.finish()
    Joiner(api.service).join()
    error = film(api, made["id"])["error"]
    assert error == {"code": "film_failed", "message": "shot 1: its video was deleted"}
