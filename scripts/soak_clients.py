"""Clients of a soak: what each of its jobs asks of the server, and what it must see."""

from __future__ import annotations

import json
import random
import re
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx

KINDS = ("malformed", "broken", "gone", "cancelled", "deleted", "duplicated")
_ASKED = [
    {"prompt": "a red circle moving left", "size": "64x48", "frames": frames, "steps": steps, "seed": seed}
    for frames, steps, seed in ((5, 6, 1), (5, 6, 2), (9, 8, 1), (5, 24, 3))
]
_MALFORMED: list[tuple[str, bytes]] = [
    ("application/json", b'{"prompt": '),
    ("application/json", b"[]"),
    ("application/json", b'{"prompt": "x", "size": "1x1"}'),
    ("application/json", b'{"prompt": "x", "frames": 6}'),
    ("application/json", b'{"prompt": "x", "model": "../../etc/passwd"}'),
    ("application/json", b'{"prompt": "x", "seed": 1e400}'),
    ("application/json", b'{"prompt": "\\ud800"}'),
    ("application/json", b'{"prompt": "x", "unknown": 1}'),
    ("application/json", b"[" * 100_000),
    ("text/plain", b"a red circle"),
    ("multipart/form-data; boundary=b", b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nx'),
    ("multipart/form-data", b"--b--"),
]
_PATIENCE = 900.0  # seconds for one job
_LOOK = 0.3  # seconds between two looks at a job
_REFUSED = range(400, 500)


def kind_of(number: int) -> str:
    """Kind of a job: a third misbehaves, in each way equally often."""
    return "plain" if number % 3 else KINDS[number // 3 % len(KINDS)]


@dataclass(slots=True)
class Outcome:
    """One job of a soak and what came of it, as a line of the log.

    Attributes:
        accepted: ids of the videos that it was told of.
        end: `completed`, `failed` (ranks or their driver were killed), `cancelled`, `deleted` or `refused`.
        asked: the request, if it is one of those that are made several times.
        digest: of the frames of a completed video.
        problems: broken promises.
    """

    number: int
    kind: str
    accepted: list[str] = field(default_factory=list)
    end: str = ""
    asked: str = ""
    digest: str = ""
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)


class Client:
    """Carries out jobs against a server that may be killed at any moment.

    Args:
        url: of the server.
        seed: jobs are a function of it and of their number.
    """

    def __init__(self, url: str, seed: int):
        self._url, self._seed = url, seed
        self._http = httpx.Client(base_url=url, timeout=60)  # for all threads

    def carry_out(self, number: int) -> Outcome:
        """Carry out one job to its end. Done again, it is the same: its key makes it one video."""
        draw, started = random.Random(f"{self._seed}/{number}"), time.monotonic()
        outcome = Outcome(number, kind := kind_of(number))
        try:
            _JOBS[kind](self, outcome, draw)
        except (_BrokenPromiseError, httpx.HTTPError) as error:
            outcome.problems.append(f"{type(error).__name__}: {error}")
        outcome.seconds = round(time.monotonic() - started, 2)
        return outcome

    def _plain(self, outcome: Outcome, draw: random.Random) -> None:
        self._follow(outcome, self._create(outcome, draw.choice(_ASKED)))

    def _malformed(self, outcome: Outcome, draw: random.Random) -> None:
        kind, body = draw.choice(_MALFORMED)
        answer = self._ask("POST", "/v1/videos", content=body, headers={"Content-Type": kind})
        if answer.status_code not in _REFUSED or "error" not in answer.json():
            raise _BrokenPromiseError(f"{body[:40]!r} was answered with {answer.status_code}")
        outcome.end = "refused"

    def _broken(self, outcome: Outcome, draw: random.Random) -> None:
        """An upload breaks off: it leaves no job, so the same request is a new one."""
        asked = draw.choice(_ASKED)
        self._send(outcome, asked, share=draw.uniform(0, 0.99))
        self._follow(outcome, self._create(outcome, asked))

    def _gone(self, outcome: Outcome, draw: random.Random) -> None:
        """A client leaves without hearing the answer, and asks again: it is one video."""
        asked = draw.choice(_ASKED)
        self._send(outcome, asked, share=1.0)
        time.sleep(draw.uniform(0, 0.5))
        self._follow(outcome, self._create(outcome, asked))

    def _cancelled(self, outcome: Outcome, draw: random.Random) -> None:
        id = self._create(outcome, draw.choice(_ASKED))
        time.sleep(draw.uniform(0, 5))
        self._expect(self._ask("POST", f"/v1/videos/{id}/cancel"), 200)
        self._follow(outcome, id, cancelled=True)

    def _deleted(self, outcome: Outcome, draw: random.Random) -> None:
        id = self._create(outcome, draw.choice(_ASKED), deleted=True)
        time.sleep(draw.uniform(0, 5))
        self._expect(self._ask("DELETE", f"/v1/videos/{id}"), 200, 404)  # 404: the answer before was lost
        self._expect(self._ask("GET", f"/v1/videos/{id}"), 404)
        outcome.end = "deleted"

    def _duplicated(self, outcome: Outcome, draw: random.Random) -> None:
        """Two clients send the same request with the same key at the same time: it is one video."""
        asked = draw.choice(_ASKED)
        with ThreadPoolExecutor(2) as twice:
            ids = {*twice.map(lambda _: self._create(outcome, asked), range(2))}
        if len(ids) != 1:
            raise _BrokenPromiseError(f"one key made {len(ids)} videos")
        self._follow(outcome, ids.pop())

    def _create(self, outcome: Outcome, asked: dict[str, Any], *, deleted: bool = False) -> str:
        """Ask for a video; returns its id.

        Args:
            deleted: a soak that was interrupted may have made and deleted it.
        """
        answer = self._ask("POST", "/v1/videos", json=asked, headers=self._key(outcome))
        if deleted and answer.status_code == 404:
            [id] = re.findall(r"video_[0-9a-f]{32}", answer.text)
        else:
            self._expect(answer, 200)
            id = answer.json()["id"]
        if id not in outcome.accepted:
            outcome.accepted.append(id)
        outcome.asked = json.dumps(asked)
        return str(id)

    def _follow(self, outcome: Outcome, id: str, *, cancelled: bool = False) -> None:
        """Wait until a video has ended, and note how."""
        deadline = time.monotonic() + _PATIENCE
        while (video := self._video(id))["status"] in ("queued", "in_progress"):
            if time.monotonic() > deadline:
                raise _BrokenPromiseError(f"{id} has not ended within {_PATIENCE:g} s")
            time.sleep(_LOOK)
        outcome.end = video["status"]
        if outcome.end == "completed":
            report = self._ask("GET", f"/v1/videos/{id}/report")
            self._expect(report, 200)
            outcome.digest = report.json()["frames_sha256"][0]
            return
        code, said = video["error"]["code"], video["error"]["message"]
        if cancelled and code == "cancelled":
            outcome.end = "cancelled"
        elif not said.startswith("stopped after it crashed"):
            raise _BrokenPromiseError(f"{id} has failed: {code}, {said}")

    def _video(self, id: str) -> dict[str, Any]:
        answer = self._ask("GET", f"/v1/videos/{id}")
        self._expect(answer, 200)
        told: dict[str, Any] = answer.json()
        return told

    def _ask(self, method: str, path: str, **more: Any) -> httpx.Response:
        """Ask, again and again while the server is away or says that it is worth trying again."""
        deadline = time.monotonic() + _PATIENCE
        while True:
            with suppress(httpx.TransportError):
                answer = self._http.request(method, path, **more)
                if answer.headers.get("x-should-retry") != "true":
                    return answer
            if time.monotonic() > deadline:
                raise _BrokenPromiseError(f"{method} {path} was not answered within {_PATIENCE:g} s")
            time.sleep(_LOOK)

    def _send(self, outcome: Outcome, asked: dict[str, Any], share: float) -> None:
        """Send a part of a request, and leave."""
        body = json.dumps(asked).encode()
        host, _, port = self._url.removeprefix("http://").partition(":")
        head = f"POST /v1/videos HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in self._key(outcome).items())
        with suppress(OSError), socket.create_connection((host, int(port)), timeout=10) as sent:
            sent.sendall(f"{head}\r\n".encode() + body[: int(share * len(body))])

    def _key(self, outcome: Outcome) -> dict[str, str]:
        return {"Idempotency-Key": f"soak-{self._seed}-{outcome.number}"}

    def _expect(self, answer: httpx.Response, *statuses: int) -> None:
        if answer.status_code not in statuses:
            asked = f"{answer.request.method} {answer.request.url.path}"
            raise _BrokenPromiseError(f"{asked} was answered with {answer.status_code}: {answer.text[:200]}")


class _BrokenPromiseError(Exception):
    """The server did what it must not do."""


_JOBS: dict[str, Callable[[Client, Outcome, random.Random], None]] = {
    "plain": Client._plain,
    "malformed": Client._malformed,
    "broken": Client._broken,
    "gone": Client._gone,
    "cancelled": Client._cancelled,
    "deleted": Client._deleted,
    "duplicated": Client._duplicated,
}
