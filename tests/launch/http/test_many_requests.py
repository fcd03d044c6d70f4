"""Many requests at once: quick ones never wait for slow ones, and memory is bounded."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import httpx
import pytest
from PIL import Image
from starlette.testclient import TestClient
from starlette.types import Receive, Scope, Send

from launch.http import assets
from launch.http.decode import decode_apart
from launch.http.errors import ApiError
from launch.http.limits import BodyLimit
from tests.serving import SMALL, Api, error_of, listening, serving

_MORE = 45  # than there are threads for requests


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    with serving(tmp_path / "queue") as opened:
        yield opened


def image() -> bytes:
    written = BytesIO()
    Image.new("RGB", (64, 48), (200, 30, 30)).save(written, "PNG")
    return written.getvalue()


def test_requests_without_images_do_not_wait_for_those_with_them(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, over = threading.Event(), threading.Event()

    def slow(content: bytes) -> bytes:
        begun.set()
        over.wait()
        return content

    monkeypatch.setattr(assets, "decode_apart", slow)
    with listening(api) as url, ThreadPoolExecutor(_MORE) as threads:
        try:

            def send(number: int) -> int:
                files = {"input_reference": ("upload", b"%d" % number)}
                return httpx.post(f"{url}/v1/videos", data=SMALL, files=files, timeout=120).status_code

            sent = [threads.submit(send, number) for number in range(_MORE)]
            assert begun.wait(60)
            for _ in range(5):  # the uploads are on their way
                assert httpx.get(f"{url}/v1/videos", timeout=30).json()["data"] == []
        finally:
            over.set()
        assert {one.result() for one in sent} == {400}  # wan-tiny takes no image


def test_an_upload_is_decoded_once(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """The studio sends an image with each estimate, and a film's may be that of every shot."""
    decoded = []

    def counted(content: bytes) -> bytes:
        decoded.append(content)
        return decode_apart(content)

    monkeypatch.setattr(assets, "decode_apart", counted)
    for route in ("/v1/videos/estimate", "/v1/videos/estimate", "/v1/videos"):
        api.client.post(route, data=SMALL, files={"input_reference": ("upload", image())})
    assert len(decoded) == 1


def test_bodies_of_all_requests_together_are_bounded() -> None:
    """What is read of a body is held until its request is answered."""
    entered, leave = threading.Semaphore(0), threading.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            while (await receive()).get("more_body", False):
                pass
        except ApiError as error:
            await error.response(scope, receive, send)
            return
        if scope["path"] == "/held":
            entered.release()
            leave.wait()
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    limited = BodyLimit(app, most=1000, together=1500)

    def send(path: str, size: int) -> httpx.Response:
        return TestClient(limited).post(path, content=b"x" * size)

    with ThreadPoolExecutor(1) as threads:
        held = threads.submit(send, "/held", 1000)
        assert entered.acquire(timeout=30)
        try:
            assert send("/", 500).status_code == 204
            refused = send("/", 501)
            assert error_of(refused)[:2] == (503, "server_busy") and refused.headers["Retry-After"] == "2"
        finally:
            leave.set()
        assert held.result().status_code == 204
    assert send("/", 1000).status_code == 204
    assert error_of(send("/", 1001))[:2] == (413, "body_too_large")
