"""Webhooks: signed as OpenAI's client checks it, tried again, given up at last, sent nowhere else."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import openai
import pytest

from launch.http.keys import add_key, make_key, new_secret, new_token
from launch.http.webhooks import Webhooks
from launch.serve.entries import State
from tests.serving import SMALL, Api, serving

SECRET = new_secret()


class Receiver(ThreadingHTTPServer):
    """A server that keeps what it gets, and answers as it is told."""

    def __init__(self) -> None:
        self.got: list[tuple[dict[str, str], bytes]] = []
        self.answers: list[int] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.got.append((dict(self.headers), body))
                self.send_response(receiver.answers.pop(0) if receiver.answers else 204)
                self.send_header("Location", receiver.url)
                self.end_headers()

            def log_message(self, *arguments: object) -> None: ...

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/hook"


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@contextmanager
def trickling() -> Iterator[str]:
    """A server whose only answer never ends; its address."""
    over = threading.Event()

    def answer(listener: socket.socket) -> None:
        peer, _ = listener.accept()
        with peer, suppress(OSError):
            peer.sendall(b"HTTP/1.1 200 OK\r\nX-Long: ")
            while not over.wait(0.05):
                peer.sendall(b"x")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=answer, args=(listener,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        finally:
            over.set()


@contextmanager
def hooked(folder: Path, url: str) -> Iterator[tuple[Api, Callable[..., str]]]:
    """An API whose owner has a webhook, and a function that creates a video there."""
    token = new_token()
    hook = {"url": url, "secret": SECRET}
    add_key(folder / "keys.yaml", make_key(token, name="ann", owner="ann", webhook=hook))
    with serving(folder / "queue", folder / "keys.yaml") as api:
        api.client.headers["Authorization"] = f"Bearer {token}"

        def create() -> str:
            id: str = api.client.post("/v1/videos", json=SMALL).json()["id"]
            return id

        yield api, create


def test_the_end_of_a_video_is_told_once(tmp_path: Path, receiver: Receiver) -> None:
    with hooked(tmp_path, receiver.url) as (api, create):
        hooks = Webhooks(api.service)
        done, failed, cancelled, deleted = (create() for _ in range(4))
        api.finish()
        api.finish(State.FAILED, "rank 0 died")
        api.client.post(f"/v1/videos/{cancelled}/cancel")
        api.client.delete(f"/v1/videos/{deleted}")
        for _ in range(3):
            hooks.send()
        Webhooks(api.service).send()  # another server on the same queue
    client = openai.OpenAI(api_key="x", webhook_secret=SECRET)
    told = {}
    for headers, body in receiver.got:
        event = client.webhooks.unwrap(body, headers)
        told[event.data.id] = event.type  # type: ignore[union-attr]
        with pytest.raises(openai.InvalidWebhookSignatureError):
            client.webhooks.unwrap(body + b" ", headers)
    assert told == {done: "video.completed", failed: "video.failed", cancelled: "video.failed"}
    assert len(receiver.got) == 3


def test_a_receiver_that_fails_is_asked_again_and_given_up(
    tmp_path: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.http.webhooks._FIRST", 0.0)
    with hooked(tmp_path, receiver.url) as (api, create):
        hooks = Webhooks(api.service)
        receiver.answers = [500, 302]
        create()
        api.finish()
        for _ in range(5):
            hooks.send()
        assert len(receiver.got) == 3  # a redirect is no success, and is not followed
        ids = {headers["webhook-id"] for headers, _ in receiver.got}
        assert len(ids) == 1 and json.loads(receiver.got[0][1])["id"] in ids
        receiver.got.clear()
        receiver.answers = [503] * 20
        create()
        api.finish()
        for _ in range(12):
            hooks.send()
        assert len(receiver.got) == 8


def test_what_was_not_sent_is_sent_by_the_next_server(tmp_path: Path, receiver: Receiver) -> None:
    with hooked(tmp_path, receiver.url) as (api, create):
        before = create()
        api.finish()
        Webhooks(api.service)  # from now on
        created = create()
        api.finish()
    with serving(tmp_path / "queue", tmp_path / "keys.yaml") as api:
        Webhooks(api.service).send()
    assert [json.loads(body)["data"]["id"] for _, body in receiver.got] == [created] and before != created


def test_a_receiver_that_answers_for_ever_is_not_waited_for(
    tmp_path: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every byte comes in time, but never the last one; the message of another owner is sent meanwhile."""
    monkeypatch.setattr("launch.http.webhooks._TIMEOUT", 5.0)
    other, hook = new_token(), {"url": receiver.url, "secret": SECRET}
    with trickling() as url, hooked(tmp_path, url) as (api, create):
        add_key(tmp_path / "keys.yaml", make_key(other, name="bob", owner="bob", webhook=hook))
        hooks = Webhooks(api.service)
        create()
        api.client.headers["Authorization"] = f"Bearer {other}"
        create()
        api.finish()
        api.finish()
        hooks.send()
        assert api.queue.read(tuple, "SELECT owner, tries FROM deliveries") == [("ann", 1)]
    assert len(receiver.got) == 1


def test_a_receiver_that_hangs_delays_its_own_messages_only(tmp_path: Path, receiver: Receiver) -> None:
    """It has more messages than are sent at a time; what happens to others meanwhile is told at once."""
    other, hook = new_token(), {"url": receiver.url, "secret": SECRET}
    with trickling() as url, hooked(tmp_path, url) as (api, create):
        add_key(tmp_path / "keys.yaml", make_key(other, name="bob", owner="bob", webhook=hook))
        hooks = Webhooks(api.service)
        for _ in range(20):
            create()
            api.finish(State.FAILED, "rank 0 died")
        thread = threading.Thread(target=hooks.send)
        thread.start()
        try:
            leased = "SELECT COUNT(*) FROM deliveries WHERE next > 0"
            deadline = time.monotonic() + 30
            while api.queue.read(tuple, leased) != [(8,)]:
                assert time.monotonic() < deadline
            api.client.headers["Authorization"] = f"Bearer {other}"
            create()
            api.finish(State.FAILED, "rank 0 died")
            while not receiver.got:
                assert thread.is_alive() and time.monotonic() < deadline
            assert api.queue.read(tuple, "SELECT COUNT(*) FROM deliveries WHERE tries > 0") == [(0,)]
        finally:
            hooks.stop()
            thread.join(8)  # a message may be on its way for 10 s
        assert not thread.is_alive()
    assert len(receiver.got) == 1


def test_nobody_there_harms_nothing(tmp_path: Path) -> None:
    with hooked(tmp_path, "http://127.0.0.1:9/") as (api, create):
        hooks = Webhooks(api.service)
        create()
        api.finish()
        hooks.send()
        assert api.queue.read(tuple, "SELECT tries FROM deliveries") == [(1,)]
