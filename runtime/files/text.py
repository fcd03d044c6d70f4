"""User text: files are read up to a size limit, and invalid characters are reported with their line."""

from __future__ import annotations

import json
import os
import re
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

from runtime.errors import BadRequestError, reason

_MOST_BYTES = 8 * 2**20  # limit of files written by hand, or by `lockstep calibrate`
_NO_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff\ufffe\uffff]")


def read_text(path: Path, field: str) -> str:
    """Read a UTF-8 file, with or without a byte order mark.

    Args:
        path: the file.
        field: field that names it, for the message.

    Raises:
        BadRequestError: there is no such file, or it is not a regular one (a pipe may never end), is larger
            than 8 MiB, is unreadable, or is not UTF-8; the message names the line.
    """
    said = f"{field}: {str(path)!r} given; "
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            kind = "a folder" if path.is_dir() else "a pipe or a device"
            raise BadRequestError(f"{said}it is {kind}; give the name of a file")
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise BadRequestError(f"{said}it cannot be read: {reason(error)}") from None
    if len(content) > _MOST_BYTES:
        raise BadRequestError(f"{said}it is larger than {_MOST_BYTES // 2**20} MiB, the limit for such files")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, byte = content.count(b"\n", 0, error.start) + 1, content[error.start]
        raise BadRequestError(
            f"{said}line {line}: it is not UTF-8 (byte 0x{byte:02x}); save the file as UTF-8"
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        OSError, ValueError: the file is missing, or does not hold a JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {reason(error)}") from None
    if not isinstance(content, dict):
        held = type(content).__name__
        raise ValueError(f"{path} holds a {held} where a JSON object is needed")  # noqa: TRY004 of a file
    return content


def no_text(text: str) -> tuple[int, str] | None:
    """Index and description of the first control character or byte that was not UTF-8, or None."""
    found = _NO_TEXT.search(text)
    if found is None:
        return None
    code = ord(found[0])
    if 0xDC80 <= code <= 0xDCFF:  # Python's escape for a byte that it could not decode
        return found.start(), f"the byte 0x{code - 0xDC00:02x}, which is not UTF-8"
    return found.start(), f"the character U+{code:04X}, which is not text"


def line_of(text: str, place: int) -> int:
    """Line number, counted from 1, of the index `place` in a text."""
    return text.count("\n", 0, place) + 1


def user_path(name: str) -> Path:
    """Path that a user named; a leading `~` is expanded."""
    path = Path(name)
    if name.startswith("~"):
        with suppress(RuntimeError):  # no such user: then it is a file of this name
            path = path.expanduser()
    return path


def is_file(path: Path) -> bool:
    """Return whether there is a file at `path`; not if the system refuses the name, as it does a long one."""
    try:
        return path.is_file()
    except OSError:
        return False


def is_folder(path: Path) -> bool:
    """Return whether there is a folder at `path`, as `is_file` does for files."""
    try:
        return path.is_dir()
    except OSError:
        return False


def beside(name: str, folder: Path) -> str:
    """Absolute path of a file that is named relative to `folder`; a leading `~` is expanded."""
    return str(without_parents(folder / user_path(name)))


def without_parents(path: Path) -> Path:
    """Absolute path without `..`, which is the parent of the folder that a link leads to, not of the link."""
    path = path.absolute()
    if ".." not in path.parts:
        return path  # as the user named it, links included
    if path.name == "..":
        return Path(os.path.realpath(path))
    return Path(os.path.realpath(path.parent), path.name)


def flatten(content: Any, path: str = "") -> dict[str, Any]:
    """Flatten nested JSON to one level: `{"request.seed": 7, …}`."""
    if not isinstance(content, dict):
        return {path: content}
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= flatten(value, f"{path}.{key}" if path else str(key))
    return flat
