"""Text that users give: files read with a bound, and characters that are no text named with their line."""

from __future__ import annotations

import json
import os
import re
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

from runtime.errors import BadRequestError

_MOST_BYTES = 8 * 2**20  # of a file that somebody wrote by hand, or `lockstep calibrate`
_NO_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff\ufffe\uffff]")


def read_text(path: Path, field: str) -> str:
    """The text of a file in UTF-8, with or without a byte order mark.

    Args:
        field: what the file was given as, for the message.

    Raises:
        BadRequestError: there is no such file, it is no regular one (a pipe may never end), it is larger than
            8 MiB, it may not be read, or it is not UTF-8; the message names the line.
    """
    said = f"{field}: {str(path)!r} given; "
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            kind = "a folder" if path.is_dir() else "a pipe or a device"
            raise BadRequestError(f"{said}it is {kind}, a file is needed")
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else error
        raise BadRequestError(f"{said}it cannot be read: {reason}") from None
    if len(content) > _MOST_BYTES:
        raise BadRequestError(f"{said}it is larger than {_MOST_BYTES // 2**20} MiB, which no such file is")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, byte = content.count(b"\n", 0, error.start) + 1, content[error.start]
        raise BadRequestError(
            f"{said}line {line}: it is not UTF-8 (byte 0x{byte:02x}); save the file as UTF-8"
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        OSError, ValueError: there is none, or it is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        held = type(content).__name__
        raise ValueError(f"{path} holds a {held} where a JSON object is needed")  # noqa: TRY004 of a file
    return content


def no_text(text: str) -> tuple[int, str] | None:
    """The first place with a control character, or with a byte that was not UTF-8, and what is there."""
    found = _NO_TEXT.search(text)
    if found is None:
        return None
    code = ord(found[0])
    if 0xDC80 <= code <= 0xDCFF:  # how Python hands on bytes that it could not decode
        return found.start(), f"the byte 0x{code - 0xDC00:02x}, which is not UTF-8"
    return found.start(), f"the character U+{code:04X}, which is no text"


def line_of(text: str, place: int) -> int:
    """The line of a place in a text, counted from 1."""
    return text.count("\n", 0, place) + 1


def user_path(name: str) -> Path:
    """The path that a user's words name; `~` is a home."""
    path = Path(name)
    if name.startswith("~"):
        with suppress(RuntimeError):  # no such user: then it is a file of this name
            path = path.expanduser()
    return path


def beside(name: str, folder: Path) -> str:
    """The absolute path of a file that is named in a file of `folder`; `~` is the user's home."""
    return os.path.normpath(folder.absolute() / user_path(name))


def flatten(content: Any, path: str = "") -> dict[str, Any]:
    """Nested JSON as one level: `{"request.seed": 7, …}`."""
    if not isinstance(content, dict):
        return {path: content}
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= flatten(value, f"{path}.{key}" if path else str(key))
    return flat
