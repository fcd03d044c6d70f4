"""Limits that apply before a request is read: no bodies that are too large, and no pages of other sites."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from launch.http.errors import ApiError


class BodyLimit:
    """Middleware that ends requests whose body is larger than `most` bytes, declared or not."""

    def __init__(self, app: ASGIApp, most: int):
        self._app, self._most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        said = Headers(scope=scope).get("content-length", "")
        if said.isdecimal() and int(said[:20]) > self._most:
            await self._refusal().response(scope, receive, send)
            return
        await self._app(scope, self._counted(receive), send)

    def _counted(self, receive: Receive) -> Receive:
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._most:
                raise self._refusal()
            return message

        return counted

    def _refusal(self) -> ApiError:
        said = f"the body is larger than {self._most / 2**20:g} MiB"
        return ApiError(413, "body_too_large", said, headers={"Connection": "close"})


class OwnPagesOnly:
    """Middleware that refuses requests that a browser sends for a page of another site.

    A browser lets any page post forms to this machine, and a page whose host name is pointed at 127.0.0.1
    (DNS rebinding) even read the answers, without the user's knowledge.

    Args:
        hosts: host names that requests may use; None if keys protect the server, or if it has many names.
    """

    def __init__(self, app: ASGIApp, hosts: Sequence[str] | None):
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            host, origin = headers.get("host", ""), headers.get("origin")
            if self._hosts is not None and _name(host) not in self._hosts:
                said = f"host: {host[:80]!r} given; this server answers to {', '.join(self._hosts)}"
                await ApiError(403, "unknown_host", said).response(scope, receive, send)
                return
            if origin is not None and _place(origin) != host.lower():
                said = f"origin: {origin[:80]!r} given; pages of other sites may not use this server"
                await ApiError(403, "foreign_origin", said).response(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _name(host: str) -> str:
    """The name in a Host header, without its port; empty if it is none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _place(origin: str) -> str:
    """Host and port of an Origin header; empty if it has none."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""
