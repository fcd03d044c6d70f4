"""Serves the studio, a page for people, from the static files in `studio/`."""

from __future__ import annotations

import hashlib
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
_Known = Annotated[str | None, Header(alias="If-None-Match")]


@router.get("/")
async def root() -> RedirectResponse:
    """Redirect from the server's address to the studio."""
    return RedirectResponse("studio/", 307, HEADERS)


@router.get("/studio/")
async def index(known: _Known = None) -> Response:
    """Get the studio's page."""
    return _answer("index.html", known)


@router.get("/studio/{name}")
async def file(name: Annotated[str, InPath(max_length=200)], known: _Known = None) -> Response:
    """Get a script, the style sheet or the icon of the studio."""
    return _answer(name, known)


def _answer(name: str, known: str | None) -> Response:
    found = _files().get(name)
    if found is None:
        raise ApiError(404, "not_found", f"the studio has no file {name[:80]!r}")
    content, tag = found
    if known == tag:
        return Response(status_code=304, headers={**HEADERS, "ETag": tag})
    return Response(content, media_type=_KINDS[Path(name).suffix], headers={**HEADERS, "ETag": tag})


_KINDS = {".js": "text/javascript", ".html": "text/html", ".css": "text/css", ".svg": "image/svg+xml"}


@cache
def _files() -> dict[str, tuple[bytes, str]]:
    """Name → content and tag. They are few and small, so that no request reaches the disk."""
    read = {path.name: path.read_bytes() for path in FILES.iterdir() if path.suffix in _KINDS}
    return {
        name: (content, f'"{hashlib.sha256(content).hexdigest()[:32]}"') for name, content in read.items()
    }
