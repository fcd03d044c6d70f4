"""Serves the studio, a page for people, from the static files in `studio/`."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Header, Response
from fastapi import Path as InPath
from fastapi.responses import RedirectResponse

from launch.http.errors import ApiError

FILES = Path(__file__).parent / "studio"
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob:",
        "media-src 'self' blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}

router = APIRouter(include_in_schema=False)
Known = Annotated[str | None, Header(alias="If-None-Match")]


@router.get("/")
async def root() -> RedirectResponse:
    """Redirect from the server's address to the studio."""
    return RedirectResponse("studio/", 307, HEADERS)


@router.get("/studio/")
async def index(known: Known = None) -> Response:
    """Get the studio's page."""
    return _answer("index.html", known)


@router.get("/studio/{name}")
async def file(name: Annotated[str, InPath(max_length=200)], known: Known = None) -> Response:
    """Get a script, the style sheet or the icon of the studio."""
    return _answer(name, known)


class Cached:
    """A page that is made when it is first asked for, and then kept.

    Args:
        make: makes it.
    """

    def __init__(self, make: Callable[[], str]):
        self._make, self._lock, self._made = make, threading.Lock(), ""

    def answer(self, known: str | None) -> Response:
        """Answer with it; see `answered`."""
        with self._lock:
            self._made = self._made or self._make()
        content = self._made.encode()
        return answered(content, _tag(content), known, ".html")


def answered(content: bytes, tag: str, known: str | None, kind: str) -> Response:
    """Answer with a page or a part of one, or with 304 if the browser has it.

    Args:
        known: tag of what the browser has.
        kind: suffix of its file.
    """
    headers = {**HEADERS, "ETag": tag}
    if known == tag:
        return Response(status_code=304, headers=headers)
    return Response(content, media_type=_KINDS[kind], headers=headers)


def _answer(name: str, known: str | None) -> Response:
    found = _files().get(name)
    if found is None:
        raise ApiError(404, "not_found", f"the studio has no file {name[:80]!r}")
    return answered(*found, known, Path(name).suffix)


_KINDS = {".js": "text/javascript", ".html": "text/html", ".css": "text/css", ".svg": "image/svg+xml"}


def _tag(content: bytes) -> str:
    return f'"{hashlib.sha256(content).hexdigest()[:32]}"'


@cache
def _files() -> dict[str, tuple[bytes, str]]:
    """Name → content and tag. They are few and small, so that no request reaches the disk."""
    read = {path.name: path.read_bytes() for path in FILES.iterdir() if path.suffix in _KINDS}
    return {name: (content, _tag(content)) for name, content in read.items()}
