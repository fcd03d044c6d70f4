"""A video beside the full sampler's: made once, with everything else equal, and measured against it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from launch.http.keys import Key, add_key, digest_of
from launch.serve.entries import State
from tests.serving import Api, error_of, serving

FORECAST = {"spectrum": "paper", "seed": 7, "steps": 12}


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    with serving(tmp_path / "queue") as opened:
        yield opened


def full(api: Api, id: str) -> dict[str, object]:
    answer = api.client.post(f"/v1/videos/{id}/full")
    assert answer.status_code == 200, answer.text
    told: dict[str, object] = answer.json()
    return told


def test_the_full_samplers_video_differs_in_forecasting_alone_and_is_made_once(api: Api) -> None:
    video = api.create(**FORECAST, deadline=60, negative="blue")
    made = full(api, video["id"])
    assert made["id"] != video["id"] and made["status"] == "queued"
    assert made["request"] == video["request"] | {"spectrum": "off", "deadline": None}
    assert full(api, video["id"])["id"] == made["id"]
    api.finish()
    api.finish()
    assert full(api, video["id"])["id"] == made["id"]  # finished, too
    api.client.delete(f"/v1/videos/{made['id']}")
    again = full(api, video["id"])
    assert again["id"] != made["id"]
    api.finish(State.FAILED, "out of memory")
    assert full(api, video["id"])["id"] != again["id"]


def test_the_full_samplers_video_is_made_once_for_all_who_ask_at_once(api: Api) -> None:
    id = api.create(**FORECAST)["id"]
    with ThreadPoolExecutor(6) as threads:
        made = list(threads.map(lambda _: full(api, id)["id"], range(6)))
    assert len({*made}) == 1 and len(api.queue.entries()) == 2


def test_a_video_without_forecasts_has_nothing_to_be_compared_with(api: Api) -> None:
    made = api.create(spectrum="off")
    assert error_of(api.client.post(f"/v1/videos/{made['id']}/full")) == (400, "video_is_full", "video_id")


def test_quality_is_measured_on_the_files(api: Api) -> None:
    video = api.create(**FORECAST)
    reference = str(full(api, video["id"])["id"])
    route = f"/v1/videos/{video['id']}/quality?reference={reference}"
    assert error_of(api.client.get(route))[1] == "video_not_ready"
    api.finish()
    api.finish()
    told = api.client.get(route).json()
    assert told["psnr"] == 100 and told["ssim"] == 1  # `finish` writes the same frames


def test_only_videos_of_one_shape_are_compared(api: Api) -> None:
    one, other = api.create(), api.create(frames=9)
    answer = api.client.get(f"/v1/videos/{one['id']}/quality?reference={other['id']}")
    assert error_of(answer) == (400, "invalid_value", "reference")
    assert "9 frames of 64×48" in answer.json()["error"]["message"]


def test_nobody_measures_the_videos_of_others(tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    for name in ("ann", "bob"):
        add_key(keys, Key(name=name, owner=name, sha256=digest_of(name)))
    with serving(tmp_path / "queue", keys) as api:
        ann, bob = ({"Authorization": f"Bearer {name}"} for name in ("ann", "bob"))
        body = {"prompt": "a", "size": "64x48", "frames": 5, **FORECAST}
        of_ann = api.client.post("/v1/videos", json=body, headers=ann).json()["id"]
        of_bob = api.client.post("/v1/videos", json=body, headers=bob).json()["id"]
        for route in (
            f"/v1/videos/{of_ann}/quality?reference={of_bob}",
            f"/v1/videos/{of_bob}/quality?reference={of_ann}",
        ):
            assert error_of(api.client.get(route, headers=bob))[:2] == (404, "video_not_found")
        assert error_of(api.client.post(f"/v1/videos/{of_ann}/full", headers=bob))[:2] == (
            404,
            "video_not_found",
        )
        mine = api.client.post(f"/v1/videos/{of_ann}/full", headers=ann).json()["id"]
        theirs = api.client.post(f"/v1/videos/{of_bob}/full", headers=bob).json()["id"]
        assert mine != theirs  # the same request, of another owner
