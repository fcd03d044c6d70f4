"""`/v1/videos`: what is accepted, what is refused and how, and that a video ends once."""

from __future__ import annotations

import errno
import json
import re
import socket
import sqlite3
import threading
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from starlette.testclient import TestClient

from launch.http import content as content_routes
from launch.http import pictures
from launch.http.app import make_app
from launch.serve.entries import Progress, State
from launch.serve.previews import RequestPreviews
from runtime.request.outputs import PREVIEW_MARK
from tests.serving import SMALL, Api, error_of, listening, serving


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    with serving(tmp_path / "queue") as opened:
        yield opened


def image(kind: str = "PNG", size: tuple[int, int] = (64, 48)) -> bytes:
    written = BytesIO()
    Image.new("RGB", size, (200, 30, 30)).save(written, kind)
    return written.getvalue()


def test_a_video_is_queued_until_a_replica_has_begun(api: Api) -> None:
    made = api.create(seconds=None, seed=7)
    assert made["status"] == "queued" and made["progress"] == 0 and made["started_at"] is None
    assert (made["object"], made["model"], made["size"], made["seconds"]) == (
        "video",
        "wan-tiny",
        "64x48",
        "0.625",
    )
    entry = api.queue.take(0)
    assert entry is not None and entry.name == made["id"] and entry.job.request.seed == 7
    assert api.video(made["id"])["status"] == "in_progress"
    api.queue.report(entry.id, Progress("", step=3, steps=4, nfe=2, seconds_left=1.5))
    running = api.video(made["id"])
    assert running["progress"] == 75 and running["run"]["nfe"] == 2 and running["run"]["seconds_left"] == 1.5
    api.queue.report(entry.id, Progress("", step=4, steps=4, nfe=2, seconds_left=0.0))
    assert api.video(made["id"])["progress"] == 99  # it decodes, and there is no video yet
    api.queue.put_back(entry.id, "rank 0 died", killed=True)
    assert api.video(made["id"])["status"] == "queued"
    api.finish()
    ended = api.video(made["id"])
    assert ended["status"] == "completed" and ended["progress"] == 100 and ended["run"]["tries"] == 2
    assert ended["expires_at"] - ended["completed_at"] >= 7 * 86400


def test_what_was_not_given_is_told(api: Api) -> None:
    one, two = api.create(seconds="1.5", frames=None, steps=50, spectrum=None), api.create()
    assert one["request"]["frames"] == 13 and one["seconds"] == "1.625"  # 4k + 1 at 8 per second
    assert one["request"]["spectrum"] == "universal" and one["request"]["guidance"] == 5.0
    assert one["request"]["seed"] != two["request"]["seed"]


def test_frames_per_second_are_the_videos_own(api: Api) -> None:
    made = api.create(seconds=1, frames=None, fps=24)
    entry = api.queue.take(0)
    assert entry is not None and entry.job.config.fps == 24 and entry.job.request.frames == 25
    assert made["request"]["fps"] == 24 and made["seconds"] == "1.04167"


def test_a_budget_becomes_the_best_preset_for_it(api: Api) -> None:
    whole = {"size": None, "frames": None, "steps": None, "spectrum": None}
    for budget, method in (({"nfe": 14}, "fitted"), ({"psnr": 50}, ""), ({"nfe": 20}, "planned")):
        made = api.create(**whole, **budget)
        entry = api.queue.take(0)
        assert entry is not None
        assert made["request"]["spectrum"].startswith(f"{method}-wan-tiny-" if method else "fitted-wan")
        assert Path(entry.job.request.spectrum).is_relative_to(api.queue.folder)
        assert made["request"] | budget == made["request"]


@pytest.mark.parametrize(
    ("fields", "status", "code", "param"),
    [
        ({"prompt": None}, 400, "invalid_value", "prompt"),
        ({"prompt": " "}, 400, "invalid_value", "prompt"),
        ({"prompt": "\ud800"}, 400, "invalid_value", "prompt"),
        ({"promt": "x"}, 400, "unknown_parameter", "promt"),
        ({"\ud800": "x"}, 400, "invalid_value", None),
        ({"model": "sora-2"}, 404, "model_not_found", "model"),
        ({"model": "../../etc/passwd"}, 400, "invalid_value", "model"),
        ({"spectrum": "/etc/passwd.yaml"}, 400, "invalid_value", "spectrum"),
        ({"spectrum": "nothing"}, 400, "invalid_value", "spectrum"),
        ({"loras": ["../x"]}, 400, "invalid_value", "loras.0.name"),
        ({"loras": ["x"]}, 400, "invalid_value", "loras"),
        ({"size": "64x50"}, 400, "invalid_value", "size"),
        ({"size": "64×48"}, 400, "invalid_value", "size"),
        ({"size": "8192x8192"}, 400, "invalid_value", "size"),
        ({"frames": 6}, 400, "invalid_value", "frames"),
        ({"frames": None, "seconds": "0"}, 400, "invalid_value", "seconds"),
        ({"frames": None, "seconds": "-1"}, 400, "invalid_value", "seconds"),
        ({"frames": None, "seconds": 9999}, 400, "invalid_value", "seconds"),
        ({"frames": None, "seconds": 10**400}, 400, "invalid_value", "seconds"),
        ({"seconds": "4"}, 400, "invalid_value", None),
        ({"steps": 201}, 400, "invalid_value", "steps"),
        ({"steps": True}, 400, "invalid_value", "steps"),
        ({"guidance": 1e999}, 400, "invalid_json", None),
        ({"nfe": 2}, 400, "invalid_value", None),
        ({"nfe": 2, "spectrum": None}, 400, "invalid_value", "nfe"),
        (
            {"input_reference": {"image_url": "http://127.0.0.1/"}},
            400,
            "invalid_value",
            "input_reference.image_url",
        ),
        ({"input_reference": {"image_url": "data:text/html,x"}}, 400, "invalid_value", "input_reference"),
        ({"input_reference": "/etc/passwd"}, 400, "invalid_value", "input_reference"),
        ({"webhook": "http://127.0.0.1"}, 400, "unknown_parameter", "webhook"),
    ],
)
def test_bad_fields_are_refused_by_name(
    api: Api, fields: dict[str, Any], status: int, code: str, param: str | None
) -> None:
    body = json.dumps({**SMALL, **fields})
    answer = api.client.post("/v1/videos", content=body, headers={"Content-Type": "application/json"})
    assert error_of(answer) == (status, code, param), answer.text
    assert answer.headers["x-should-retry"] == "false"
    assert api.queue.entries() == []


@pytest.mark.parametrize(
    ("body", "kind", "status", "code"),
    [
        (b"", "application/json", 400, "invalid_json"),
        (b"{}", "application/json", 400, "missing_required_parameter"),
        (b"[]", "application/json", 400, "invalid_json"),
        (b"\xff", "application/json", 400, "invalid_json"),
        (b"[" * 100_000, "application/json", 400, "invalid_json"),
        (b'{"prompt": ' + b"[" * 20 + b"]" * 20 + b"}", "application/json", 400, "invalid_json"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "application/json", 400, "invalid_json"),
        (b'{"prompt": "x", "prompt": "y"}', "application/json", 400, "invalid_json"),
        (b'{"a": [' + b"[]," * 10**6 + b"[]]}", "application/json", 400, "invalid_json"),
        (b"x", "text/plain", 415, "unsupported_media_type"),
        (b"x", "multipart/form-data", 400, "invalid_form"),
        (b"--b\r\nx", "multipart/form-data; boundary=b", 400, "invalid_form"),
        (b"a=1&a=2", "application/x-www-form-urlencoded", 400, "invalid_form"),
        (b"a=1&a[b]=2", "application/x-www-form-urlencoded", 400, "invalid_form"),
        (b'{"prompt": "x"}', "application/x-www-form-urlencoded", 400, "invalid_form"),
        (b"a[b=1", "application/x-www-form-urlencoded", 400, "invalid_form"),
        (b"a" + b"[b]" * 50 + b"=1", "application/x-www-form-urlencoded", 400, "invalid_form"),
        (b"x" * (33 * 2**20), "application/json", 413, "body_too_large"),
    ],
)
def test_bodies_that_are_none_are_refused(api: Api, body: bytes, kind: str, status: int, code: str) -> None:
    answer = api.client.post("/v1/videos", content=body, headers={"Content-Type": kind})
    assert error_of(answer)[:2] == (status, code), answer.text


def test_only_values_that_may_be_meant_are_read(api: Api) -> None:
    """A body of millions of values would keep the event loop busy, whatever is in them."""
    answer = api.client.post("/v1/videos", content=b'{"a": [' + b"0," * 10**6 + b"0]}")
    assert "more than 200000 values" in answer.json()["error"]["message"]
    commas = api.client.post("/v1/videos/estimate", json={**SMALL, "prompt": "," * 5000})
    assert commas.status_code == 200, commas.text


@pytest.mark.parametrize("charset", ["undefined", "punycode", "utf-16", "hex", ""])
def test_a_form_is_utf_8(api: Api, charset: str) -> None:
    """Its sender would choose a decoder of Python's: one always fails, one takes minutes for a megabyte."""
    form = b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n\xe4\r\n--b--\r\n'
    kind = f"multipart/form-data; boundary=b; charset={charset}"
    answer = api.client.post("/v1/videos", content=form, headers={"Content-Type": kind})
    assert error_of(answer)[:2] == (415, "unsupported_media_type")
    kind = 'multipart/form-data; boundary=b; charset="UTF-8"'
    assert api.client.post("/v1/videos", content=form, headers={"Content-Type": kind}).status_code == 200


def test_a_body_without_a_length_is_bounded_too(api: Api) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(34):
            yield b"x" * 2**20

    assert error_of(api.client.post("/v1/videos", content=endless()))[:2] == (413, "body_too_large")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "not_found"),
        ("PUT", "/v1/videos", 405, "method_not_allowed"),
        ("GET", "/v1/videos/video_0", 404, "video_not_found"),
        ("GET", "/v1/videos/..%2F..%2Fetc%2Fpasswd", 404, "not_found"),
        ("DELETE", "/v1/videos/video_0", 404, "video_not_found"),
        ("POST", "/v1/videos/video_0/cancel", 404, "video_not_found"),
        ("POST", "/v1/videos/video_0/resume", 404, "video_not_found"),
        ("GET", "/v1/videos?limit=0", 400, "invalid_value"),
        ("GET", "/v1/videos?limit=101", 400, "invalid_value"),
        ("GET", "/v1/videos?order=up", 400, "invalid_value"),
        ("GET", "/v1/videos?after=video_0", 400, "invalid_value"),
    ],
)
def test_errors_have_one_shape_everywhere(api: Api, method: str, path: str, status: int, code: str) -> None:
    assert error_of(api.client.request(method, path))[:2] == (status, code)


def test_an_error_of_ours_is_told_as_one(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(api.service.records, "page", broken)
    assert error_of(api.client.get("/v1/videos"))[:2] == (500, "server_error")


def test_a_queue_that_is_locked_may_be_asked_again(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    api.queue._base.execute("PRAGMA busy_timeout = 50")
    other = sqlite3.connect(api.queue.folder / "queue.sqlite", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    answer = api.client.post("/v1/videos", json=SMALL)
    other.execute("ROLLBACK")
    other.close()
    assert error_of(answer)[:2] == (503, "queue_unavailable") and answer.headers["Retry-After"] == "5"
    assert api.client.get("/v1/videos").json()["data"] == []


def test_a_form_has_nested_fields(api: Api) -> None:
    form = {**SMALL, "seed": "9", "input_reference[image_url]": "data:text/html,x"}
    assert error_of(api.client.post("/v1/videos", data=form))[2] == "input_reference"
    made = api.client.post("/v1/videos", data={**SMALL, "seed": "9"}).json()
    assert made["request"]["seed"] == 9 and made["request"]["frames"] == 5


def test_pages_follow_one_another(api: Api) -> None:
    ids = [api.create()["id"] for _ in range(5)]
    first = api.client.get("/v1/videos?limit=2").json()
    assert [one["id"] for one in first["data"]] == [ids[4], ids[3]] and first["has_more"]
    assert (first["first_id"], first["last_id"]) == (ids[4], ids[3])
    second = api.client.get(f"/v1/videos?limit=3&after={first['last_id']}").json()
    assert [one["id"] for one in second["data"]] == [ids[2], ids[1], ids[0]] and not second["has_more"]
    rising = api.client.get(f"/v1/videos?order=asc&after={ids[1]}").json()
    assert [one["id"] for one in rising["data"]] == ids[2:]
    assert [one["run"]["position"] for one in rising["data"]] == [2, 3, 4]
    api.client.delete(f"/v1/videos/{ids[3]}")
    after_deleted = api.client.get(f"/v1/videos?after={ids[3]}").json()
    assert [one["id"] for one in after_deleted["data"]] == [ids[2], ids[1], ids[0]]


def test_clients_are_told_when_to_ask_again(api: Api) -> None:
    def after(id: str) -> str | None:
        found: str | None = api.client.get(f"/v1/videos/{id}").headers.get("openai-poll-after-ms")
        return found

    one, two = api.create()["id"], api.create()["id"]
    assert (after(one), after(two)) == ("1000", "2000")
    entry = api.queue.take(0)
    assert entry is not None
    api.queue.report(entry.id, Progress("", step=10, steps=50, nfe=5, seconds_left=60.0))
    assert after(one) == "1500"  # the time of a step
    api.queue.end(entry.id, State.FAILED, "rank 0 died")
    assert after(one) is None


def test_content_is_a_file_with_ranges_and_pictures(api: Api) -> None:
    id = api.create()["id"]
    place = f"/v1/videos/{id}/content"
    assert error_of(api.client.get(place))[:2] == (400, "video_not_ready")
    api.finish()
    whole = api.client.get(place)
    assert whole.headers["content-type"] == "video/mp4" and whole.content[4:8] == b"ftyp"
    part = api.client.get(place, headers={"Range": "bytes=4-7"})
    assert part.status_code == 206 and part.content == b"ftyp"
    size = len(whole.content)
    last = api.client.get(place, headers={"Range": "bytes=-4"})
    assert last.status_code == 206 and last.content == whole.content[-4:]
    two = api.client.get(place, headers={"Range": "bytes=0-3, 4-7, -1"})
    assert two.status_code == 206 and two.headers["content-type"].startswith("multipart/byteranges")
    for beyond in (f"bytes={size}-", "bytes=-0"):
        answer = api.client.get(place, headers={"Range": beyond})
        assert error_of(answer)[:2] == (416, "range_not_satisfiable")
        assert answer.headers["Content-Range"] == f"bytes */{size}"
    for ignored in ("bytes=7-4", "bytes=x-", "bytes=", "lines=1-2", "bytes=0-1,x", "bytes=1_0-", "7"):
        assert api.client.get(place, headers={"Range": ignored}).content == whole.content
    for tag, status in ((whole.headers["ETag"], 206), ('"another"', 200)):
        answer = api.client.get(place, headers={"Range": "bytes=4-7", "If-Range": tag})
        assert answer.status_code == status
    with Image.open(BytesIO(api.client.get(f"{place}?variant=thumbnail").content)) as thumbnail:
        assert thumbnail.format == "WEBP" and thumbnail.size == (64, 48)
    with Image.open(BytesIO(api.client.get(f"{place}?variant=spritesheet").content)) as sheet:
        assert sheet.format == "JPEG" and sheet.size == (3 * 64, 2 * 48)
        red = [sheet.getpixel((64 * (n % 3) + 32, 48 * (n // 3) + 24))[0] for n in range(5)]
    assert red == sorted(red) and red[4] - red[0] > 200
    assert error_of(api.client.get(f"{place}?variant=picture"))[:2] == (404, "content_missing")
    api.service.store.video(id).unlink()
    assert error_of(api.client.get(place))[:2] == (404, "content_missing")


def test_a_video_that_is_removed_while_it_is_requested_is_missing(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before its files are opened, or when its frames were read and the picture is about to be written."""
    for number, variant in enumerate(("video", "thumbnail", "spritesheet", "spritesheet")):
        id = api.create()["id"]
        api.finish()
        module, name = (content_routes, "made") if number < 3 else (pictures, "pick_frames")
        found = getattr(module, name)

        def removed(*arguments: Any, found: Any = found, id: str = id) -> Any:
            result = found(*arguments)
            api.service.store.remove(id)
            return result

        with monkeypatch.context() as patch:
            patch.setattr(module, name, removed)
            answer = api.client.get(f"/v1/videos/{id}/content?variant={variant}")
        assert error_of(answer)[:2] == (404, "content_missing"), (number, variant)


def test_a_disk_that_is_full_is_told(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if it fills up after a look at it, while a file is written."""

    def fill(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/srv/queue/assets/a.png")

    monkeypatch.setattr(Path, "write_bytes", fill)
    answer = api.client.post("/v1/videos", data=SMALL, files={"input_reference": ("upload", image())})
    assert error_of(answer)[:2] == (507, "disk_full") and "srv" not in answer.text
    monkeypatch.undo()
    with serving(api.queue.folder, free=2**62) as full:
        answer = full.client.post(
            "/v1/videos/estimate", data=SMALL, files={"input_reference": ("upload", image())}
        )
        assert error_of(answer)[:2] == (507, "disk_full")
        assert not list((api.queue.folder / "assets").glob("*.png"))


def test_a_report_keeps_the_users_texts_and_no_folder(api: Api) -> None:
    id = api.create()["id"]
    api.finish()
    place = f"/v1/videos/{id}/report"
    assert error_of(api.client.get(place))[:2] == (404, "content_missing")
    told = {
        "request": {
            "prompt": "/imagine a/b",
            "negative": "/",
            "image": "/srv/a.png",
            "spectrum": "/q/p/x.yaml",
        },
        "model": {"name": "/models/own", "revision": "1"},
        "videos": ["/q/results/video.mp4"],
        "warnings": ["image: '/srv/a.png' was stretched"],
    }
    api.service.store.video(id).with_suffix(".json").write_text(json.dumps(told))
    assert api.client.get(place).json() == {
        "request": {"prompt": "/imagine a/b", "negative": "/", "image": "a.png", "spectrum": "x.yaml"},
        "model": {"name": "own", "revision": "1"},
        "videos": ["video.mp4"],
        "warnings": ["image: 'a.png' was stretched"],
    }


def test_a_preview_is_there_while_the_video_is_made(api: Api) -> None:
    id = api.create()["id"]
    place = f"/v1/videos/{id}/preview"
    assert error_of(api.client.get(place))[:2] == (404, "no_preview")
    entry = api.queue.take(0)
    assert entry is not None
    shown = image("WEBP") + PREVIEW_MARK  # as every preview has it
    with RequestPreviews(api.queue.folder).of(entry.id) as file:
        assert file.put(shown)
        api.queue.report(entry.id, Progress("", 1, 4, 1, 1.0, str(file.path)))
        assert api.video(id)["run"]["preview"]
        answer = api.client.get(place)
        assert answer.headers["content-type"] == "image/webp" and answer.content == shown
    assert error_of(api.client.get(place))[:2] == (404, "no_preview")  # its pool was killed
    api.queue.end(entry.id, State.DONE)
    assert not api.video(id)["run"]["preview"]


def test_an_upload_that_breaks_off_is_no_request(api: Api) -> None:
    form = b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na red circle\r\n--b--\r\n'
    head = (
        "POST /v1/videos HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: multipart/form-data; boundary=b\r\n"
        f"Content-Length: {len(form) + 100}\r\n\r\n"
    )
    with listening(api) as url:
        port = int(url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as broken:
            broken.sendall(head.encode() + form)
        with socket.create_connection(
            ("127.0.0.1", port)
        ) as unheard:  # whole, but nobody waits for the answer
            unheard.sendall(head.replace(str(len(form) + 100), str(len(form))).encode() + form)
        while not api.queue.entries():
            pass
    assert len(api.queue.entries()) == 1


def test_a_failure_is_told_without_the_servers_folders(api: Api) -> None:
    id = api.create()["id"]
    folder = api.queue.folder / "Ann's results"  # which `repr` writes between other quotes
    api.finish(State.FAILED, f"out: {str(api.queue.folder / 'x.mp4')!r}, {str(folder / 'y.mp4')!r} exist")
    video = api.video(id)
    assert video["status"] == "failed" and video["error"]["code"] == "generation_failed"
    assert video["error"]["message"] == "out: 'x.mp4', \"y.mp4\" exist"
    assert error_of(api.client.get(f"/v1/videos/{id}/content"))[:2] == (400, "video_failed")


def test_a_cancelled_video_failed_and_can_be_resumed(api: Api) -> None:
    waiting, running = api.create()["id"], api.create()["id"]
    entry = api.queue.take(0)
    assert entry is not None and entry.name == waiting
    waiting, running = running, waiting
    told = api.client.post(f"/v1/videos/{waiting}/cancel").json()
    assert told["status"] == "failed" and told["error"]["code"] == "cancelled"
    told = api.client.post(f"/v1/videos/{running}/cancel").json()
    assert told["status"] == "in_progress" and told["run"]["cancelling"]
    assert error_of(api.client.post(f"/v1/videos/{running}/resume"))[:2] == (400, "video_not_resumable")
    api.queue.end(entry.id, State.CANCELLED, "cancelled; stopped after step 2")
    assert api.video(running)["error"]["code"] == "cancelled"
    assert api.client.post(f"/v1/videos/{running}/resume").json()["status"] == "queued"
    again = api.queue.take(0)
    assert again is not None and again.job.checkpoints is not None and again.job.checkpoints.resume
    api.queue.end(again.id, State.DONE)
    assert api.video(running)["status"] == "completed"
    assert error_of(api.client.post(f"/v1/videos/{running}/resume"))[:2] == (400, "video_not_resumable")


def test_an_expired_request_says_so(api: Api) -> None:
    id = api.create(expires=0.001)["id"]
    while api.video(id)["status"] == "queued":
        api.queue.expire()
    assert api.video(id)["error"]["code"] == "expired"


def test_a_deleted_video_is_gone(api: Api) -> None:
    done, running, waiting = (api.create()["id"] for _ in range(3))
    api.finish()
    entry = api.queue.take(0)
    assert entry is not None
    for id in (done, running, waiting):
        told = api.client.delete(f"/v1/videos/{id}").json()
        assert told == {"id": id, "object": "video.deleted", "deleted": True}
        assert error_of(api.client.get(f"/v1/videos/{id}"))[1] == "video_not_found"
        assert error_of(api.client.get(f"/v1/videos/{id}/content"))[1] == "video_not_found"
    assert not api.service.store.video(done).parent.exists()
    assert api.queue.entry(entry.id).unwanted  # its replica stops after a step
    assert api.queue.count()[State.WAITING] == 0
    assert api.client.get("/v1/videos").json()["data"] == []


def test_a_remix_differs_in_its_prompt_alone(api: Api) -> None:
    before = api.create(seed=None, guidance=3.0)
    answer = api.client.post(f"/v1/videos/{before['id']}/remix", json={"prompt": "a blue square"})
    after = answer.json()
    assert after["request"] == before["request"] and after["prompt"] == "a blue square"
    assert after["remixed_from_video_id"] == before["id"] and after["id"] != before["id"]
    bad = api.client.post(f"/v1/videos/{before['id']}/remix", json={"prompt": "x", "seed": 1})
    assert error_of(bad) == (400, "unknown_parameter", "seed")


def test_a_repeated_request_is_carried_out_once(api: Api) -> None:
    def ask(key: str, **fields: Any) -> Any:
        return api.client.post("/v1/videos", json={**SMALL, **fields}, headers={"Idempotency-Key": key})

    answers: list[Any] = []
    threads = [threading.Thread(target=lambda: answers.append(ask("one"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert sorted(answer.headers.get("Idempotent-Replayed", "") for answer in answers) == ["", *["true"] * 3]
    assert ask("two").json()["id"] != answers[0].json()["id"]
    assert error_of(ask("one", prompt="other"))[:2] == (422, "idempotency_key_reused")
    assert error_of(ask("x" * 256))[:2] == (400, "invalid_value")
    assert len(api.queue.entries()) == 2


def test_a_repeated_request_is_answered_whatever_is_in_the_way_of_another(tmp_path: Path) -> None:
    headers = {"Idempotency-Key": "one"}
    with serving(tmp_path / "queue") as api:
        before = api.client.post("/v1/videos", json=SMALL, headers=headers).json()["id"]
    with serving(tmp_path / "queue", free=2**62) as api:
        assert error_of(api.client.post("/v1/videos", json=SMALL))[:2] == (507, "disk_full")
        again = api.client.post("/v1/videos", json=SMALL, headers=headers)
        assert again.json()["id"] == before and again.headers["Idempotent-Replayed"] == "true"
        other = api.client.post("/v1/videos", json={**SMALL, "prompt": "other"}, headers=headers)
        assert error_of(other)[:2] == (422, "idempotency_key_reused")


def test_what_cannot_be_finished_is_not_accepted(tmp_path: Path) -> None:
    with serving(tmp_path / "full", free=2**62) as api:
        assert error_of(api.client.post("/v1/videos", json=SMALL))[:2] == (507, "disk_full")
        assert api.queue.entries() == []
    with serving(tmp_path / "long", queued=2) as api:
        api.create(), api.create()
        answer = api.client.post("/v1/videos", json=SMALL)
        assert error_of(answer)[:2] == (429, "queue_full") and answer.headers["x-should-retry"] == "true"
        api.finish()
        api.create()


def test_pages_of_other_sites_may_not_use_it(api: Api) -> None:
    def get(**headers: str) -> Any:
        return api.client.get("/v1/videos", headers=headers)

    assert error_of(get(host="evil.example"))[:2] == (403, "unknown_host")
    assert error_of(get(host="[::1"))[:2] == (403, "unknown_host")
    for origin in ("http://evil.example", "null", "http://127.0.0.1:9", "http://["):
        assert error_of(get(origin=origin))[:2] == (403, "foreign_origin")
    assert get(origin="http://127.0.0.1:8000").status_code == 200
    assert get(host="localhost:8000", origin="http://localhost:8000").status_code == 200
    image = {"sec-fetch-mode": "no-cors", "sec-fetch-dest": "image"}
    for site in ("cross-site", "same-site"):  # another port is the same site
        assert error_of(get(**image, **{"sec-fetch-site": site}))[:2] == (403, "foreign_origin")
        assert get(**{"sec-fetch-site": site, "sec-fetch-mode": "navigate"}).status_code == 200
    for site in ("same-origin", "none"):
        assert get(**image, **{"sec-fetch-site": site}).status_code == 200


def test_without_keys_it_is_for_its_own_machine(api: Api) -> None:
    """Whatever address a proxy before it listens on, such as Ray Serve's."""
    for address, status in (
        ("10.0.0.7", 403),
        ("::ffff:10.0.0.7", 403),
        ("::ffff:127.0.0.1", 200),
        ("::1", 200),
    ):
        client = TestClient(make_app(api.service), base_url="http://localhost", client=(address, 5000))
        assert client.get("/healthz").status_code == status, address
    assert error_of(TestClient(make_app(api.service), client=("10.0.0.7", 1)).get("/"))[1] == "not_local"


def test_an_upload_is_decoded_bounded_and_kept_once(api: Api) -> None:
    """wan-tiny takes no image, so it is refused, but only after the image was found to be one."""

    def send(content: bytes) -> Any:
        return api.client.post("/v1/videos", data=SMALL, files={"input_reference": ("upload", content)})

    answer = send(image("JPEG"))
    assert error_of(answer)[:2] == (400, "invalid_value") and "wan-tiny" in answer.text
    for content in (b"", b"<svg/>", image("GIF"), image()[:90], b"x" * (20 * 2**20 + 1)):
        assert error_of(send(content)) == (400, "invalid_value", "input_reference")
    bomb = BytesIO()
    Image.new("1", (30_000, 30_000)).save(bomb, "PNG")
    assert error_of(send(bomb.getvalue()))[2] == "input_reference"
    digests = {api.service.store.add_image(image(kind)) for kind in ("PNG", "WEBP")}
    assert len(digests) == 2 and all(len(digest) == 64 for digest in digests)
    sent = image("PNG")
    digest = api.service.store.add_image(sent)
    assert digest in digests
    api.service.store.image(digest).unlink()  # as no video used it
    assert api.service.store.add_image(sent) == digest and api.service.store.image(digest).stat().st_size
    with Image.open(api.service.store.image(digests.pop())) as kept:
        assert kept.format == "PNG" and kept.size == (64, 48)


def test_the_api_describes_itself(api: Api) -> None:
    told = api.client.get("/openapi.json").json()
    schemas = told["components"]["schemas"]
    assert {"VideoCreate", "Video", "VideoList", "ErrorBody", "Remix"} <= schemas.keys()
    for name in set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(told))):
        assert name in schemas, name
