"""Kinds of files, told by their content: one that is given or replaced for another is named as what it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from runtime.errors import BadRequestError

REPORT: Final = "a report of `lockstep generate`"
COMPARISON: Final = "a comparison by `lockstep compare`"
CALIBRATION: Final = "a calibration"
CONFIG: Final = "a config"
PRESET: Final = "a forecasting preset"
STORYBOARD: Final = "a storyboard"
GPU: Final = "the description of a GPU"
KEYS: Final = "a file of API keys"
VIDEO: Final = "an mp4"
PICTURE: Final = "a PNG"
PREVIEW: Final = "a WebP"
LATENTS: Final = "a safetensors file"

# Fields that together tell a kind of JSON or YAML, the most particular first.
_FIELDS: Mapping[str, frozenset[str]] = {
    REPORT: frozenset({"decision_digest", "request"}),
    CALIBRATION: frozenset({"grams", "noise_levels"}),
    COMPARISON: frozenset({"rows", "results"}),
    "the manifest of a film": frozenset({"shots", "schema"}),
    "the manifest of a checkpoint": frozenset({"parts", "step"}),
    "the recipe of a checkpoint": frozenset({"request", "preset", "code"}),
    "the index of a model's folder": frozenset({"_class_name"}),
    STORYBOARD: frozenset({"shots"}),
    GPU: frozenset({"memory_gib"}),
    KEYS: frozenset({"keys"}),
    PRESET: frozenset({"schedule"}),
    CONFIG: frozenset({"model"}),
}
_FIELD: Mapping[str, str] = {  # option → the kind of file that it names
    "config": CONFIG,
    "spectrum": PRESET,
    "calibration": CALIBRATION,
    "storyboard": STORYBOARD,
    "gpu": GPU,
    "keys": KEYS,
    "report": REPORT,
}
_FOR: Mapping[str, str] = {  # kind → where it is to be given
    CONFIG: "--config (in Python: load)",
    PRESET: "--spectrum or --preset (in Python: spectrum)",
    CALIBRATION: "`lockstep plan`, and a preset's `calibration`",
    STORYBOARD: "`lockstep storyboard`",
    GPU: "--gpu",
    KEYS: "--keys",
}
_LARGEST = 8 * 2**20  # bytes of a JSON file that is looked at


def kind_of(content: Any) -> str | None:
    """Tell the kind of the content of a JSON or YAML file; None if it is none of Lockstep's."""
    if not isinstance(content, dict):
        return None
    return next((kind for kind, fields in _FIELDS.items() if fields <= content.keys()), None)


def check_kind(content: Any, field: str, path: Path) -> None:
    """Refuse the content of a file that is of another kind than `field` needs; unknown kinds pass.

    Raises:
        BadRequestError: it is of another kind.
    """
    found, needed = kind_of(content), _FIELD.get(field)
    if found is not None and needed is not None and found != needed:
        place = f"; it is for {_FOR[found]}" if found in _FOR else ""
        raise BadRequestError(f"{field}: {str(path)!r} given; it is {found}, not {needed}{place}")


def check_kind_of_file(path: Path, field: str) -> None:
    """Refuse a file as `check_kind` does, from its content, whatever its name; one that is neither JSON nor
    YAML passes.

    Raises:
        BadRequestError: it is of another kind.
    """
    content = _json(path)
    check_kind(_yaml(path) if content is None else content, field, path)


def check_replaced(path: Path, kind: str, field: str) -> None:
    """Refuse to replace an existing file by one of another kind; an empty file may be replaced by any.

    Args:
        path: the file.
        kind: kind of the file that will be written.
        field: option that names it.

    Raises:
        BadRequestError: it is of another kind.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(16)
    if not head or _is(kind, head, path):
        return
    found = kind_of(_json(path)) if head.lstrip().startswith(b"{") else None
    raise BadRequestError(
        f"{field}: {str(path)!r} is {found or 'some other file'}, not {kind}, and `overwrite` does not "
        "replace files of another kind: give another name"
    )


def _is(kind: str, head: bytes, path: Path) -> bool:
    match kind:
        case "an mp4":
            return head[4:8] == b"ftyp"
        case "a PNG":
            return head.startswith(b"\x89PNG")
        case "a WebP":
            return head[:4] + head[8:12] == b"RIFFWEBP"
        case "a safetensors file":
            return head[8:9] == b"{"
        case "a forecasting preset":
            return kind_of(_yaml(path)) == kind
        case _:
            return kind_of(_json(path)) == kind


def _json(path: Path) -> Any:
    """Content of a JSON file; None if it is none, or too large to be Lockstep's."""
    try:
        with path.open("rb") as file:
            return json.loads(file.read(_LARGEST))
    except (OSError, ValueError, RecursionError):
        return None


def _yaml(path: Path) -> Any:
    from runtime.files.yaml import YamlFile  # which uses this module

    try:
        return YamlFile.read(path, "file").root.content
    except BadRequestError:
        return None
