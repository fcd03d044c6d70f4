"""Server-sent events: whole, in order, and gone on with where a client left off."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from launch.http.auth import Keys
from launch.http.keys import add_key, make_key, new_token
from launch.serve.entries import Progress, RunEvent, State
from tests.serving import Api, error_of, listening, serving


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    with serving(tmp_path / "queue") as opened:
        yield opened


@pytest.fixture
def client(api: Api) -> Iterator[httpx.Client]:
    with listening(api) as url, httpx.Client(base_url=url, timeout=30) as opened:
        yield opened


def parsed(lines: Iterator[str]) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Number, kind and content of each event, as they come."""
    fields: dict[str, str] = {}
    for line in lines:
        if line:
            name, _, value = line.partition(": ")
            fields[name] = value
        elif "data" in fields:
            yield int(fields["id"]), fields["event"], json.loads(fields["data"])
            fields = {}


def follow(client: httpx.Client, path: str, **options: Any) -> list[tuple[int, str, dict[str, Any]]]:
    """All events of a stream that ends."""
    with client.stream("GET", path, **options) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        return list(parsed(answer.iter_lines()))


def run(api: Api, steps: int = 3) -> int:
    entry = api.queue.take(0)
    assert entry is not None
    begun = RunEvent("begun", {"label": "off", "kinds": "ccc"})
    told = [RunEvent("step", {"step": step + 1, "steps": steps, "kind": "compute"}) for step in range(steps)]
    api.queue.report(entry.id, Progress("off", steps, steps, steps, 0.0), [begun, *told])
    return entry.id


def test_a_video_is_followed_to_its_end(api: Api, client: httpx.Client) -> None:
    id = api.create()["id"]
    api.create()  # another's events are not told
    path = f"/v1/videos/{id}/events"
    with client.stream("GET", path) as answer:
        events = parsed(answer.iter_lines())
        assert next(events)[2]["status"] == "queued"
        request = run(api)
        assert next(events)[2]["status"] == "in_progress"
        assert next(events)[1] == "begun"
        told = [next(events) for _ in range(3)]
        assert [(kind, one["step"], one["video_id"]) for _, kind, one in told] == [
            ("step", step, id) for step in (1, 2, 3)
        ]
        api.queue.end(request, State.DONE)
        number, kind, last = next(events)
        assert (kind, last["status"], last["error"]) == ("state", "completed", None)
        assert next(events, None) is None  # the stream ends
    whole = follow(client, path)
    assert [kind for _, kind, _ in whole] == ["state", "state", "begun", "step", "step", "step", "state"]
    assert [one[0] for one in whole] == sorted(one[0] for one in whole)
    left = follow(client, path, headers={"Last-Event-ID": str(whole[3][0])})
    assert left == whole[4:]
    assert follow(client, f"{path}?after={whole[5][0]}") == whole[6:]
    assert client.get(path, headers={"Last-Event-ID": str(number)}).status_code == 204


def test_a_resumed_video_is_followed_further(api: Api, client: httpx.Client) -> None:
    id = api.create()["id"]
    request = run(api)
    api.queue.end(request, State.FAILED, "rank 0 died")
    client.post(f"/v1/videos/{id}/resume")
    with client.stream("GET", f"/v1/videos/{id}/events") as answer:
        events = parsed(answer.iter_lines())
        told = [next(events) for _ in range(8)]
        assert told[6][2]["error"] == {"code": "generation_failed", "message": "rank 0 died"}
        assert told[7][2]["status"] == "queued"
        api.finish()
        assert [one["status"] for _, _, one in events] == ["in_progress", "completed"]


def test_all_videos_are_followed_from_now_or_from_anywhere(api: Api, client: httpx.Client) -> None:
    first = api.create()["id"]
    with client.stream("GET", "/v1/events") as answer:
        events = parsed(answer.iter_lines())
        second = api.create()["id"]
        while (told := next(events))[2]["video_id"] == first:
            pass
        assert told[2]["video_id"] == second
    with client.stream("GET", "/v1/events?after=0") as answer:
        events = parsed(answer.iter_lines())
        assert [next(events)[2]["video_id"] for _ in range(2)] == [first, second]


def test_a_number_of_another_queue_misses_nothing(api: Api, client: httpx.Client) -> None:
    """As after a restart on an empty folder: those numbers are yet to come here."""
    id = api.create()["id"]
    seen = {"Last-Event-ID": "1000000"}
    for path in ("/v1/events", f"/v1/videos/{id}/events"):
        with client.stream("GET", path, headers=seen) as answer:
            assert next(parsed(answer.iter_lines()))[2]["video_id"] == id
    api.finish()
    assert [one["status"] for _, _, one in follow(client, path, headers=seen)] == [
        "queued", "in_progress", "completed"
    ]  # fmt: skip


def test_a_stream_ends_with_its_video(api: Api, client: httpx.Client) -> None:
    id = api.create()["id"]
    api.queue.take(0)
    with client.stream("GET", f"/v1/videos/{id}/events") as answer:
        events = parsed(answer.iter_lines())
        assert next(events)[2]["status"] == "queued"
        client.delete(f"/v1/videos/{id}")
        other = api.create()["id"]  # wakes it up
        assert all(one["video_id"] != other for _, _, one in events)
    assert client.get(f"/v1/videos/{id}/events").status_code == 404


def test_events_are_their_owners(tmp_path: Path) -> None:
    file, tokens = tmp_path / "keys.yaml", {}
    for owner in ("ann", "bob"):
        tokens[owner] = new_token()
        add_key(file, make_key(tokens[owner], name=owner, owner=owner))
    with serving(tmp_path / "queue", file) as api, listening(api) as url:
        assert not Keys(file).open
        client = httpx.Client(base_url=url, timeout=30)
        ids = {
            owner: client.post(
                "/v1/videos", json={"prompt": "x"}, headers={"Authorization": f"Bearer {token}"}
            ).json()["id"]
            for owner, token in tokens.items()
        }
        headers = {"Authorization": f"Bearer {tokens['bob']}"}
        with client.stream("GET", "/v1/events?after=0", headers=headers) as answer:
            assert next(parsed(answer.iter_lines()))[2]["video_id"] == ids["bob"]
        assert client.get(f"/v1/videos/{ids['ann']}/events", headers=headers).status_code == 404
        assert client.get("/v1/events").status_code == 401
        client.close()


def test_one_owner_cannot_take_all_streams(api: Api, client: httpx.Client) -> None:
    opened = [client.stream("GET", "/v1/events") for _ in range(32)]
    answers = [one.__enter__() for one in opened]
    lines = [answer.iter_lines() for answer in answers]
    assert all(next(one).startswith("retry") for one in lines)
    answer = client.get("/v1/events")
    assert error_of(answer)[:2] == (429, "too_many_streams")
    for one in opened:
        one.__exit__(None, None, None)
    status = 429
    while status == 429:  # until the server has noticed that they are gone
        with client.stream("GET", "/v1/events") as answer:
            status = answer.status_code


def test_streams_are_counted_before_another_is_opened(api: Api) -> None:
    """Many that are asked for at the same moment are not all let in."""

    async def open_all(url: str) -> list[int]:
        found: list[int] = []
        over = asyncio.Event()

        async def one(client: httpx.AsyncClient) -> None:
            async with client.stream("GET", "/v1/events") as answer:
                found.append(answer.status_code)
                if len(found) == 48:
                    over.set()
                await over.wait()

        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:
            await asyncio.gather(*(one(client) for _ in range(48)))
        return found

    with listening(api) as url:
        found = asyncio.run(open_all(url))
    assert found.count(200) == 32 and found.count(429) == 16
