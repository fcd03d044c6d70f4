"""Answers with files, whole or in ranges."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from fastapi.responses import FileResponse
from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from launch.http.errors import ApiError

_TYPES = {".mp4": "video/mp4", ".webp": "image/webp", ".jpg": "image/jpeg", ".png": "image/png"}
_RANGE = re.compile(r"(\d{1,18})-(\d{0,18})|-\d{1,18}")
BINARY: dict[int | str, dict[str, Any]] = {
    200: {"content": {kind: {} for kind in _TYPES.values()}, "description": "The file, or a range."}
}


class RangedFile(FileResponse):
    """Response with a file, or with the ranges of it that a request names.

    A header `Range` that is malformed or of other units is ignored, as RFC 9110 (section 14.2) says.

    Args:
        name: how a browser calls the file when it saves it.

    Raises:
        FileNotFoundError: it is not there.
    """

    def __init__(self, path: Path, name: str):
        super().__init__(
            path,
            media_type=_TYPES[path.suffix],
            filename=name,
            stat_result=path.stat(),
            content_disposition_type="inline",
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def told(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] == 416:
                range = Headers(raw=message["headers"])["content-range"]
                said = f"range: the file does not have these bytes; its size is {range.rpartition('/')[2]}"
                raise ApiError(416, "range_not_satisfiable", said, headers={"Content-Range": range})
            await send(message)

        if not _is_range(Headers(scope=scope).get("range", "")):
            left = [(name, value) for name, value in scope["headers"] if name != b"range"]
            scope = {**scope, "headers": left}
        await super().__call__(scope, receive, told)


def _is_range(text: str) -> bool:
    """Whether a header `Range` is of bytes, and well-formed."""
    unit, _, ranges = text.partition("=")
    found = [_RANGE.fullmatch(one.strip()) for one in ranges.split(",")]
    return unit.strip().lower() == "bytes" and all(
        one is not None and not (one[2] and int(one[2]) < int(one[1])) for one in found
    )
