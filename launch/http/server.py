"""The server's process: uvicorn in the main thread, the pool beside it, until a signal ends both."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

import click
import uvicorn
from fastapi import FastAPI
from rich.console import Console

from launch.http.app import LOCAL_HOSTS, make_app
from launch.http.connections import Connection, most_connections
from launch.http.pool import PoolKeeper
from launch.http.service import Service
from launch.shell.terminal import say
from runtime.errors import BadRequestError
from runtime.parallel.signals import SignalCount, ending_signals

_WAITING = 1024  # connections that wait for being accepted
_AT_ONCE = 64  # that are accepted before it is seen how many are open
_LEAVING = 5  # seconds for answers that are being sent when the server is told to end


def bind(host: str, port: int, *, open: bool) -> socket.socket:
    """Bind the server's address.

    Args:
        host: name or address.
        port: 0 for a free one.
        open: whether the server asks for no keys.

    Raises:
        BadRequestError: the address does not exist or is in use, or would let others in without keys.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        if open and address[0] not in LOCAL_HOSTS:
            raise BadRequestError(
                f"host: {host!r} given; without --keys the server listens only on this machine (127.0.0.1)"
            )
        return socket.create_server(address[:2], family=family, backlog=_WAITING)
    except (OSError, UnicodeError) as error:
        said = getattr(error, "strerror", None) or error
        raise BadRequestError(f"host, port: {host!r}, {port} given; {said}") from None


def run_server(service: Service, pool: PoolKeeper, bound: socket.socket, console: Console) -> None:
    """Serve until a signal comes; then stop the pool after a step, or at once after a second signal."""
    host, port = bound.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    server = _Server(make_app(service), url)
    asked = SignalCount()

    def hear(number: int, frame: FrameType | None) -> None:
        if asked.hear():
            server.should_exit = True
            if asked.count > 1:
                server.force_exit = True
                pool.hurry()

    before = {number: signal.signal(number, hear) for number in ending_signals()}
    try:
        pool.start()
        server.run(sockets=[bound])
        if server.problem is not None:
            raise server.problem
        say(console, "stopping the replicas after this step; a second signal stops them immediately")
    finally:
        pool.stop()
        for number, handler in before.items():
            signal.signal(number, handler)


class _Server(uvicorn.Server):
    """Uvicorn that prints its address when it answers, and leaves signals to us.

    Attributes:
        problem: why the address could not be printed; the server has ended because of it.
    """

    problem: OSError | None = None

    def __init__(self, app: FastAPI, url: str):
        super().__init__(
            uvicorn.Config(
                app,
                http=Connection,
                limit_concurrency=most_connections(),
                backlog=_AT_ONCE,
                loop="asyncio",  # the same whatever else is installed
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=_LEAVING,
            )
        )
        self._url, self._hub = url, app.state.hub

    async def startup(self, sockets: Sequence[socket.socket] | None = None) -> None:
        await super().startup(list(sockets or []))
        for one in sockets or []:
            one.listen(_WAITING)  # uvicorn's backlog is also that of the system
        if self.started:
            try:
                click.echo(self._url)
            except OSError as error:
                self.problem, self.should_exit = error, True

    async def shutdown(self, sockets: Sequence[socket.socket] | None = None) -> None:
        await self._hub.close()  # streams would be waited for
        await super().shutdown(list(sockets or []))

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
