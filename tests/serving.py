"""The HTTP API in this process, on a real queue; what a pool would do is done to the queue by hand."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from starlette.testclient import TestClient

from launch.http.app import make_app
from launch.http.auth import Keys
from launch.http.catalog import Catalog
from launch.http.connections import Connection
from launch.http.service import Bounds, Service
from launch.serve.entries import State
from launch.serve.queue import Queue
from runtime.media.mp4 import mp4_writer

SMALL = {"prompt": "a red circle", "size": "64x48", "frames": 5, "steps": 4, "spectrum": "off"}


class Api:
    """A client of an app on a queue.

    Attributes:
        service: what answers.
        client: as a program would ask; errors of the server are responses, not exceptions.
    """

    def __init__(self, service: Service):
        self.service, self.queue = service, service.queue
        app = make_app(service)
        self.client = TestClient(app, base_url="http://127.0.0.1:8000", raise_server_exceptions=False)

    def create(self, **fields: Any) -> dict[str, Any]:
        answer = self.client.post("/v1/videos", json={**SMALL, **fields})
        assert answer.status_code == 200, answer.text
        told: dict[str, Any] = answer.json()
        return told

    def video(self, id: str) -> dict[str, Any]:
        told: dict[str, Any] = self.client.get(f"/v1/videos/{id}").json()
        return told

    def finish(self, state: State = State.DONE, reason: str = "") -> str:
        """Take the next request as a replica does, end it, and return its video's id."""
        entry = self.queue.take(0)
        assert entry is not None
        id = entry.name.partition(".")[0]
        if state is State.DONE:
            path = entry.job.outputs.video
            path.parent.mkdir(parents=True, exist_ok=True)
            request = entry.job.request
            frames = np.zeros((request.frames, request.height, request.width, 3), np.uint8)
            frames[..., 0] = np.linspace(0, 255, request.frames, dtype=np.uint8)[:, None, None]
            with mp4_writer(path, width=request.width, height=request.height, fps=8) as sink:
                sink.write(frames)
        self.queue.end(entry.id, state, reason)
        return id


@contextmanager
def serving(folder: Path, keys: Path | None = None, **bounds: Any) -> Iterator[Api]:
    """An API on the queue in `folder`."""
    with closing(Queue(folder)) as queue:
        yield Api(Service.on(queue, Catalog.of(["wan-tiny"]), Keys(keys), Bounds(**bounds)))


@contextmanager
def listening(api: Api, connections: int | None = None) -> Iterator[str]:
    """The app behind a real uvicorn in another thread; its address.

    Args:
        connections: bound of the server's.
    """
    server = uvicorn.Server(
        uvicorn.Config(
            make_app(api.service),
            http=Connection,
            port=0,
            log_config=None,
            lifespan="off",
            limit_concurrency=connections,
            timeout_graceful_shutdown=1,
        )
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        thread.join(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


def error_of(answer: Any) -> tuple[int, str, str | None]:
    """Status, code and field of an error, whose shape is the contract's."""
    told = answer.json()["error"]
    assert set(told) == {"message", "type", "param", "code"} and told["message"] and told["type"]
    return answer.status_code, told["code"], told["param"]
