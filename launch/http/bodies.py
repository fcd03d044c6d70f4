"""Bodies of requests, as JSON or as a form: read within bounds, into nested fields.

OpenAI's client sends forms in which `a[b]=1` is `{"a": {"b": 1}}` and `a[]=1` is an item of a list.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import Request
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from launch.http.errors import ApiError

MOST_BYTES = 32 * 2**20  # of a body; an image of 20 MiB fits as base64
_DEPTH = 8  # of nested fields
_VALUES = 200_000  # of a JSON body; many small ones would keep the server busy for seconds
_FIELDS, _FILES, _PART = 1000, 4, 2**20  # of a form; bytes of a part that is no file
_TAIL = 300  # bytes of a form's end; a boundary has at most 70
_NAME = re.compile(r"([^\[\]]+)((?:\[[^\[\]]*\])*)")
_JSON = "application/json"
_FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")


async def read_fields(request: Request) -> dict[str, Any]:
    """Read the body of a request into nested fields; uploads are bytes.

    Raises:
        ApiError: it is neither a JSON object nor a form, or is too deep or too long.
        ClientDisconnect: the client left before its end.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind in _FORMS:
        return await _read_form(request)
    if kind not in ("", _JSON):
        known = ", ".join((_JSON, *_FORMS))
        raise ApiError(
            415, "unsupported_media_type", f"content-type: {kind[:80]!r} given; it must be {known}"
        )
    return _parse(await request.body())


def _parse(content: bytes) -> dict[str, Any]:
    if sum(content.count(mark) for mark in (b",", b"[", b"{")) > _VALUES:
        raise ApiError(400, "invalid_json", f"the body has more than {_VALUES} values")
    try:
        found = json.loads(content, parse_constant=_refuse_constant, object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        said = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
        raise ApiError(400, "invalid_json", f"the body is not valid JSON: {said}") from None
    if not isinstance(found, dict):
        raise ApiError(400, "invalid_json", "the body must be a JSON object")
    _check_depth(found)
    return found


def _refuse_constant(word: str) -> None:
    raise ValueError(f"{word} is not JSON")


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys differ; which of two values is meant is anyone's guess."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name[:80]!r} is given twice")
        found[name] = value
    return found


def _check_depth(value: Any, depth: int = 0) -> None:
    if depth > _DEPTH:
        raise ApiError(400, "invalid_json", f"fields are nested more than {_DEPTH} levels deep")
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for one in inner:
        _check_depth(one, depth + 1)


async def _read_form(request: Request) -> dict[str, Any]:
    found: dict[str, Any] = {}
    _check_charset(request)
    whole = _Whole(request.scope, request.receive)
    try:
        async with whole.form(max_files=_FILES, max_fields=_FIELDS, max_part_size=_PART) as form:
            whole.check_end()
            for name, value in form.multi_items():
                _put(found, name, await value.read() if isinstance(value, UploadFile) else value)
    except HTTPException as error:
        raise ApiError(400, "invalid_form", f"the form cannot be read: {str(error.detail)[:200]}") from None
    return found


def _check_charset(request: Request) -> None:
    """Refuse a form in another charset: some of Python's decoders take minutes, or are for no text at all.

    Raises:
        ApiError: it names another one.
    """
    _, options = parse_options_header(request.headers["content-type"])
    charset = options.get(b"charset", b"utf-8").decode("latin-1")
    if charset.lower() not in ("utf-8", "utf8"):
        said = f"content-type: the charset {charset[:80]!r} given; it must be UTF-8"
        raise ApiError(415, "unsupported_media_type", said)


class _Whole(Request):
    """A request whose form is refused if it breaks off, which its parser does not notice."""

    _tail = b""

    async def stream(self) -> AsyncGenerator[bytes, None]:
        async for chunk in super().stream():
            self._tail = (self._tail + chunk)[-_TAIL:]
            yield chunk

    def check_end(self) -> None:
        """Refuse a form without its last boundary.

        Raises:
            ApiError: it has none.
        """
        _, options = parse_options_header(self.headers["content-type"])
        boundary = options.get(b"boundary")
        if boundary is not None and b"--" + boundary + b"--" not in self._tail:
            raise ApiError(400, "invalid_form", "the form ends before its last boundary")


def _put(fields: dict[str, Any], name: str, value: str | bytes) -> None:
    """Put a value where a name such as `a[b][]` says."""
    if name.startswith("{"):  # what curl sends as a form unless it is told otherwise
        said = "the body looks like JSON; send it with the header Content-Type: application/json"
        raise ApiError(400, "invalid_form", said)
    parts = _NAME.fullmatch(name)
    if parts is None:
        raise ApiError(400, "invalid_form", f"the form has a field with the name {name[:80]!r}")
    way = [parts[1], *re.findall(r"\[([^\[\]]*)\]", parts[2])]
    if len(way) > _DEPTH:
        raise ApiError(400, "invalid_form", f"fields are nested more than {_DEPTH} levels deep")
    _put_at(fields, way, value)


def _put_at(into: dict[str, Any], way: list[str], value: Any) -> None:
    key, rest = way[0], way[1:]
    if not rest:
        if key in into:
            raise _again(key)
        into[key] = value
    elif rest[0] == "":
        items = into.setdefault(key, [])
        if not isinstance(items, list):
            raise _again(key)
        if len(rest) == 1:
            items.append(value)
        else:  # the next item begins with a key that the last one has
            if not items or not isinstance(items[-1], dict) or rest[1] in items[-1]:
                items.append({})
            _put_at(items[-1], rest[1:], value)
    else:
        inner = into.setdefault(key, {})
        if not isinstance(inner, dict):
            raise _again(key)
        _put_at(inner, rest, value)


def _again(key: str) -> ApiError:
    return ApiError(400, "invalid_form", f"the form gives {key[:80]!r} more than once", param=key[:80])
