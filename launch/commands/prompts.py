"""Files of prompts: many requests of one command, and the names of their files."""

from __future__ import annotations

import json
import re
import string
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

from runtime.errors import BadRequestError, reason
from runtime.files.checks import check_suffix
from runtime.files.problems import shown
from runtime.files.text import beside
from runtime.request.config import is_path
from runtime.request.prompts import read_prompts
from runtime.request.video_request import VideoRequest

NAMED = ("out", "report", "preview", "latents")  # options that name a file of each video
DEFAULT_OUT = "{number:03d}-{slug}.mp4"
_FIELDS = sorted({*VideoRequest.model_fields} - {"embedded"} | {*NAMED})
_READ = ("image", "extend")  # fields that name a file to read
_LONGEST = 40  # characters of a slug


@dataclass(frozen=True)
class Line:
    """A request in a file of prompts.

    Attributes:
        number: its number among the requests, from 1.
        where: file and line, for messages.
        text: what the line says.
        path: the file.
    """

    number: int
    where: str
    text: str
    path: Path

    @cached_property
    def fields(self) -> Mapping[str, Any]:
        """What the line says, by the names of a request's fields.

        Raises:
            BadRequestError: it is no request.
        """
        return {"prompt": self.text} if self.path.suffix == ".txt" else _parse(self.text, self.path)


def read_requests(path: Path) -> list[Line]:
    """Read a file of requests: `.txt` has a prompt per line, `.jsonl` an object with a request's fields.

    Files that a JSON object names are relative to the folder of `path`, but for those that are written.

    Raises:
        BadRequestError: there is none.
    """
    check_suffix(path, ".txt", ".jsonl", field="prompts")
    where = f"prompts: {str(path)!r}, line "
    requests = enumerate(read_prompts(path).items(), 1)
    return [Line(number, f"{where}{line}: ", text, path) for number, (line, text) in requests]


def _parse(text: str, path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRequestError(f"it is not JSON: {reason(error)}") from None
    if not isinstance(fields, dict):
        raise BadRequestError(f'{shown(fields)} given; an object is needed, such as {{"prompt": "…"}}')
    for name in fields:
        if name not in _FIELDS:
            near = get_close_matches(name, _FIELDS, n=1)
            known = f"did you mean {near[0]}?" if near else f"the fields are {', '.join(_FIELDS)}"
            raise BadRequestError(f"{name[:80]}: unknown field; {known}")
    folder = path.absolute().parent
    for name in _READ:
        if isinstance(fields.get(name), str) and fields[name]:
            fields[name] = beside(fields[name], folder)
    if isinstance(preset := fields.get("spectrum"), str) and is_path(preset):
        fields["spectrum"] = beside(preset, folder)
    return fields


def filled(line: Line, templates: Mapping[str, str | Path], seed: int) -> Iterator[tuple[str, str]]:
    """Yield options with the names of a request's files, from templates such as `{number:03d}-{slug}.mp4`.

    Args:
        line: the request.
        templates: option → template.
        seed: seed of the request.

    Raises:
        BadRequestError: a template is not valid.
    """
    known = {"number": line.number, "slug": slug(str(line.fields.get("prompt", ""))), "seed": seed}
    for option, template in templates.items():
        given = str(template)
        try:
            used = {name for _, name, _, _ in string.Formatter().parse(given) if name is not None}
            name = given.format(**known) if used <= known.keys() else ""
        except (ValueError, LookupError):
            name = ""
        if not name:
            raise BadRequestError(
                f"{option}: {given!r} given; in a name for many videos, {{number}}, {{slug}} and {{seed}} "
                "are replaced, as in {number:03d}-{slug}.mp4; a brace alone is written twice"
            )
        yield option, name


def slug(prompt: str) -> str:
    """Make a part of a file's name from a prompt: its first words in lower case, joined by hyphens."""
    words = re.sub(r"[\W_]+", "-", unicodedata.normalize("NFKC", prompt).lower()).strip("-")
    if len(words) > _LONGEST:
        whole, _, part = words[: _LONGEST + 1].rpartition("-")
        words = whole or part[:_LONGEST]
    return words or "video"
