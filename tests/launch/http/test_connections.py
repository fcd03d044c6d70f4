"""Connections that do nothing, or do it slowly: each ends in time, and is in nobody's way."""

from __future__ import annotations

import asyncio
import json
import resource
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from launch.http import connections, server
from launch.http.app import make_app
from launch.http.connections import Connection
from tests.serving import SMALL, Api, listening, serving


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    with serving(tmp_path / "queue") as opened:
        yield opened


def connect(url: str, sent: bytes = b"") -> socket.socket:
    peer = socket.create_connection((urlsplit(url).hostname, urlsplit(url).port), timeout=30)
    peer.sendall(sent)
    return peer


def read(peer: socket.socket) -> bytes:
    """All that comes until the other side closes the connection."""
    found = bytearray()
    while more := peer.recv(2**20):
        found += more
    return bytes(found)


def error_in(answer: bytes) -> tuple[int, str]:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"content-type: application/json" in head.lower() and b"connection: close" in head.lower()
    return int(head.split()[1]), json.loads(body)["error"]["code"]


def test_a_request_that_does_not_come_in_time_is_not_waited_for(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "_REQUEST", 0.5)
    monkeypatch.setattr(connections, "_SILENCE", 0.5)
    host = b"Host: 127.0.0.1\r\n"
    post = (
        b"POST /v1/videos HTTP/1.1\r\n"
        + host
        + b"Content-Type: application/json\r\nContent-Length: 99\r\n\r\n"
    )
    with listening(api) as url, ExitStack() as stack:
        silent, half, broken, kept, body = (
            stack.enter_context(connect(url, sent))
            for sent in (
                b"",
                b"GET /healthz HTTP/1.1\r\nX-Slow: ",
                b"\x16\x03\x01 no HTTP\r\n\r\n",
                b"GET /healthz HTTP/1.1\r\n" + host + b"\r\nGET /healthz HTTP/1.1\r\n",
                post + b'{"prompt": ',
            )
        )
        assert read(silent) == b""
        assert error_in(read(half)) == (408, "request_timeout")
        assert error_in(read(broken)) == (400, "invalid_http")
        assert b'{"status":"ok"}' in read(kept)  # and the half of another request after it
        assert read(body) == b""
    assert api.client.get("/v1/videos").json()["data"] == []


def test_headers_that_trickle_get_no_more_time(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "_REQUEST", 0.5)
    with listening(api) as url, connect(url, b"GET /healthz HTTP/1.1\r\n") as peer:
        peer.settimeout(0.05)
        for _ in range(600):
            peer.sendall(b"X")
            try:
                found = peer.recv(65536)
                break
            except TimeoutError:
                continue
        assert found.startswith(b"HTTP/1.1 408 ")


def test_a_body_that_comes_slowly_is_read_to_its_end(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part comes in time; together they take longer."""
    monkeypatch.setattr(connections, "_REQUEST", 0.2)
    monkeypatch.setattr(connections, "_SILENCE", 20.0)
    content = json.dumps(SMALL).encode()
    waiting = iter([content[:9], content[9:50], content[50:]])

    def slowly() -> Iterator[bytes]:
        for part in waiting:
            threading.Event().wait(0.3)
            yield part

    with listening(api) as url:
        headers = {"Content-Type": "application/json", "Content-Length": str(len(content))}
        assert (
            httpx.post(f"{url}/v1/videos", content=slowly(), headers=headers, timeout=60).status_code == 200
        )


def test_an_answer_that_nobody_reads_is_given_up(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "_SILENCE", 3.0)
    id = api.create()["id"]
    api.finish()
    api.service.store.video(id).write_bytes(bytes(32 * 2**20))
    ask = f"GET /v1/videos/{id}/content HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()
    with listening(api) as url, connect(url) as peer, connect(url) as second:
        peer.sendall(ask)
        second.sendall(ask.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        assert len(read(second)) > 32 * 2**20  # who reads gets all of it
        with pytest.raises(ConnectionError):
            for _ in range(300):
                peer.send(b"x")
                threading.Event().wait(0.1)


def test_a_client_that_leaves_cancels_nothing(api: Api) -> None:
    """Neither the one that has sent its whole request, nor those that follow the video."""
    host, content = b"Host: 127.0.0.1\r\n", json.dumps(SMALL).encode()
    kind = b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(content)
    with listening(api) as url:
        for _ in range(5):
            connect(url, b"POST /v1/videos HTTP/1.1\r\n" + host + kind + content).close()
        deadline = time.monotonic() + 150  # the first request loads much
        while len(videos := api.client.get("/v1/videos").json()["data"]) < 5:
            assert time.monotonic() < deadline
        running = api.queue.take(0)
        assert running is not None
        for id in (running.name, videos[0]["id"]):
            with connect(url, f"GET /v1/videos/{id}/events HTTP/1.1\r\n".encode() + host + b"\r\n") as peer:
                assert peer.recv(65536).startswith(b"HTTP/1.1 200 ")
            connect(url, f"GET /v1/videos/{id} HTTP/1.1\r\n".encode() + host + b"\r\n").close()
    seen = [(one["status"], one["run"]["cancelling"]) for one in api.client.get("/v1/videos").json()["data"]]
    assert seen == [("queued", False)] * 4 + [("in_progress", False)]


def test_idle_connections_make_room_and_busy_ones_stay(api: Api) -> None:
    with listening(api, connections=4) as url, ExitStack() as stack:
        events = b"GET /v1/events HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
        busy = [stack.enter_context(connect(url, events)) for _ in range(3)]
        for peer in busy:
            assert peer.recv(65536).startswith(b"HTTP/1.1 200 ")
        idle = [stack.enter_context(connect(url)) for _ in range(5)]
        assert httpx.get(f"{url}/healthz").status_code == 200
        for peer in idle:  # each of them had to make room
            assert read(peer) == b""
        with stack.enter_context(connect(url, events)) as last:
            assert last.recv(65536).startswith(b"HTTP/1.1 200 ")
            with connect(url) as refused:
                assert error_in(read(refused)) == (503, "server_busy")
        assert api.client.get("/healthz").status_code == 200


def test_file_descriptors_are_left_for_all_else(monkeypatch: pytest.MonkeyPatch) -> None:
    raised = []
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limits: raised.append(limits))
    for limits, most, then in (
        ((1024, 4096), 2000, [(2256, 4096)]),
        ((512, 1024), 768, [(1024, 1024)]),
        ((20000, 20000), 2000, []),
        ((64, 64), 64, []),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), 2000, []),
    ):
        monkeypatch.setattr(resource, "getrlimit", lambda kind, limits=limits: limits)
        raised.clear()
        assert (connections.most_connections(), raised) == (most, then), limits


def test_many_that_come_at_once_are_counted_as_they_are_accepted(
    api: Api, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else they would use up the file descriptors before any is closed; none of them has to come again."""
    most = 50
    monkeypatch.setattr(server, "most_connections", lambda: most)
    opened: list[int] = []
    made = Connection.connection_made

    def counted(self: Connection, transport: asyncio.Transport) -> None:
        made(self, transport)
        opened.append(len(self.connections))

    monkeypatch.setattr(Connection, "connection_made", counted)
    with server.bind("127.0.0.1", 0, open=True) as bound, ExitStack() as stack:
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        served = server._Server(make_app(api.service), url)
        idle = [stack.enter_context(connect(url)) for _ in range(500)]  # before it accepts any
        thread = threading.Thread(target=served.run, args=([bound],))
        thread.start()
        try:
            assert httpx.get(f"{url}/healthz", timeout=60).status_code == 200
            for peer in idle[:400]:
                assert read(peer) == b""
        finally:
            served.should_exit = True
            thread.join()
    assert capsys.readouterr().out == f"{url}\n"
    assert len(opened) == 501 and max(opened) <= 250  # of 500; the closing ones are among them
