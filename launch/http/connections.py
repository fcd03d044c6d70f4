"""Connections of clients, each bounded in time, and all of them in number.

Uvicorn alone waits for ever for half a request, for a body that stops, and for an answer that nobody reads;
each of these holds a file descriptor that the queue may need.
"""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from launch.http.errors import ApiError

_REQUEST = 20.0  # seconds for a request to begin, and for all of its headers
_SILENCE = 60.0  # seconds in which more of a body comes, and in which more of an answer is read
_MOST, _FEWEST = 2000, 64  # connections
_ELSE = 256  # file descriptors for all else


def most_connections() -> int:
    """How many connections may be open, so that file descriptors are left for the queue and for processes.

    The process's limit of file descriptors is raised as far as the system allows.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = _MOST + _ELSE if hard == resource.RLIM_INFINITY else min(_MOST + _ELSE, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    return max(_FEWEST, allowed - _ELSE)


class Connection(H11Protocol):
    """A connection of a client, for uvicorn.

    When more than `limit_concurrency` are open, the one that is idle for longest is closed; if none is idle,
    the new one is refused.
    """

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self._most = self.limit_concurrency
        self.limit_concurrency = None  # uvicorn would refuse in plain text
        self._since = 0.0  # when it was opened, or its last answer ended
        self._coming, self._going = _Timer(self.loop, self._late), _Timer(self.loop, self._unread)

    @property
    def idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._since = self.loop.time()
        self._coming.start(_REQUEST)
        if self._most is not None and len(self.connections) > self._most:
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        self._coming.stop()
        self._going.stop()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self.idle:
            self._await_body()
        elif not self._coming.runs:  # more does not give a slow request more time
            self._coming.start(_REQUEST)

    def on_response_complete(self) -> None:
        self._since = self.loop.time()
        self._coming.stop()
        super().on_response_complete()  # and it begins with the next request, if that has come
        if not self.idle:
            self._await_body()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._going.start(_SILENCE)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._going.stop()

    def send_400_response(self, msg: str) -> None:
        self._refuse(ApiError(400, "invalid_http", "this is not a request of HTTP/1.1"))

    def _await_body(self) -> None:
        if self.cycle.more_body:
            self._coming.start(_SILENCE)
        else:
            self._coming.stop()

    def _late(self) -> None:
        """Close the connection: nothing more came in time."""
        if not self.idle and self.flow.read_paused:  # it is us who do not listen
            self._coming.start(_SILENCE)
        elif self.conn.our_state is h11.IDLE and self.conn.trailing_data[0]:
            said = f"the headers of the request did not arrive within {_REQUEST:g} s"
            self._refuse(ApiError(408, "request_timeout", said, retry_after=1))
        else:
            self.transport.close()

    def _unread(self) -> None:
        """Give up a client that does not read its answer."""
        self.transport.abort()

    def _make_room(self) -> None:
        others = [one for one in self.connections if one is not self and isinstance(one, Connection)]
        idle = [one for one in others if one.idle and not one.transport.is_closing()]
        if idle:
            min(idle, key=lambda one: one._since).transport.close()
        else:
            said = "all connections of this server are in use; try again"
            self._refuse(ApiError(503, "server_busy", said, retry_after=2))

    def _refuse(self, error: ApiError) -> None:
        """Answer with an error before there is a request that the app could answer."""
        error.headers["Connection"] = "close"
        answer = error.response
        head = f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\n".encode()
        lines = b"".join(b"%b: %b\r\n" % line for line in answer.raw_headers)
        self.transport.write(head + lines + b"\r\n" + bytes(answer.body))
        self.transport.close()


class _Timer:
    """Does something unless it is stopped in time."""

    def __init__(self, loop: asyncio.AbstractEventLoop, work: Callable[[], None]):
        self._loop, self._work = loop, work
        self._handle: asyncio.TimerHandle | None = None

    @property
    def runs(self) -> bool:
        return self._handle is not None

    def start(self, seconds: float) -> None:
        """Begin anew."""
        self.stop()
        self._handle = self._loop.call_later(seconds, self._fire)

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _fire(self) -> None:
        self._handle = None
        self._work()
