"""Limits that apply before a request is read: no bodies that are too large, and no pages of other sites."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv6Address, ip_address
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from launch.http.errors import ApiError


class BodyLimit:
    """Middleware that ends requests whose body is larger than `most` bytes, declared or not.

    Args:
        together: bytes that the bodies of all requests may have that are being answered; those for which no
            memory is left are to come again.
    """

    def __init__(self, app: ASGIApp, most: int, together: int):
        self._app, self._most, self._together, self._held = app, most, together, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        said = Headers(scope=scope).get("content-length", "")
        if said.isdecimal() and int(said[:20]) > self._most:
            await self._refusal().response(scope, receive, send)
            return
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            size = len(message.get("body", b""))
            read += size
            self._held += size
            if read > self._most:
                raise self._refusal()
            if self._held > self._together:
                said = "the server is busy with the bodies of other requests; try again"
                raise ApiError(503, "server_busy", said, retry_after=2, headers={"Connection": "close"})
            return message

        try:
            await self._app(scope, counted, send)
        finally:
            self._held -= read

    def _refusal(self) -> ApiError:
        said = f"the body is larger than {self._most / 2**20:g} MiB"
        return ApiError(413, "body_too_large", said, headers={"Connection": "close"})


class OwnPagesOnly:
    """Middleware that refuses requests that a browser sends for a page of another site.

    A browser lets any page post forms to this machine, and a page whose host name is pointed at 127.0.0.1
    (DNS rebinding) even read the answers, without the user's knowledge. What a page only shows, such as an
    image, is asked for without an Origin; browsers tell then by Sec-Fetch-Site where it is shown.

    Args:
        hosts: host names of this machine, which requests must use, and come from it; None if keys protect the
            server, or if it has many names.
    """

    def __init__(self, app: ASGIApp, hosts: Sequence[str] | None):
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            host, origin = headers.get("host", ""), headers.get("origin")
            if self._hosts is not None and _is_remote(scope):
                said = "this server has no keys, and answers only to clients on its own machine"
                await ApiError(403, "not_local", said).response(scope, receive, send)
                return
            if self._hosts is not None and _name(host) not in self._hosts:
                said = f"host: {host[:80]!r} given; this server answers to {', '.join(self._hosts)}"
                await ApiError(403, "unknown_host", said).response(scope, receive, send)
                return
            foreign = origin is not None and _place(origin) != host.lower()
            if foreign or _is_part_of_another_site(headers):
                given = f"origin: {(origin or '')[:80]!r}" if foreign else "sec-fetch-site: another"
                said = f"{given} given; pages of other sites may not use this server"
                await ApiError(403, "foreign_origin", said).response(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _is_remote(scope: Scope) -> bool:
    """Whether a request comes from another machine."""
    client = scope.get("client")
    try:
        address = ip_address(client[0]) if client else None
    except ValueError:  # a socket without addresses
        return False
    inner = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return address is not None and not (inner or address).is_loopback


def _name(host: str) -> str:
    """The name in a Host header, without its port; empty if it is none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _is_part_of_another_site(headers: Headers) -> bool:
    """Whether a browser asks for something in a page of another site; a link from there may be followed."""
    elsewhere = headers.get("sec-fetch-site") in ("cross-site", "same-site")
    return elsewhere and headers.get("sec-fetch-mode") != "navigate"


def _place(origin: str) -> str:
    """Host and port of an Origin header; empty if it has none."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""
