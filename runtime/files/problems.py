"""Explanations of invalid input: one line per bad field, with its value and what is allowed."""

from __future__ import annotations

import re
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

HIDDEN = "hidden"  # type of a problem with a value that no message may show, as it may be a secret
_SHOWN = 80  # characters of a value that are shown
_ADVICE = {
    "model_type": "should be a mapping, such as key: value",
    "dict_type": "should be a mapping, such as key: value",
    "string_type": "should be text",
}


def explain(error: ValidationError, source: str = "", model: type[BaseModel] | None = None) -> str:
    """Explain a pydantic error, one line per bad field: where it is, what was given, what is allowed.

    Args:
        error: the error.
        source: prefix of each line.
        model: model whose fields are suggested for unknown ones.
    """
    prefix = f"{source}: " if source else ""
    problems = error.errors(include_url=False)
    return "\n".join(prefix + explain_one(problem, problem["loc"], model) for problem in problems)


def explain_one(
    problem: Mapping[str, Any], way: Sequence[int | str], model: type[BaseModel] | None = None
) -> str:
    """Explain one problem of a pydantic error, in one line.

    Args:
        problem: from the error.
        way: path of the field, as the user knows it.
        model: as in `explain`.
    """
    field = ".".join(str(part)[:_SHOWN] for part in way if not _is_hidden(part)) or "value"
    if problem["type"] == "missing":
        return f"{field}: missing"
    if problem["type"] == "extra_forbidden":
        return f"{field}: unknown field{_suggested(problem['loc'], model)}"
    message = problem["msg"].removeprefix("Value error, ")
    message = _ADVICE.get(problem["type"], message[:1].lower() + message[1:]).removeprefix("input ")
    if problem["type"] == HIDDEN:
        return f"{field}: {message}"
    if problem["type"] == "value_error" and isinstance(problem["input"], dict):
        return f"{field}: {message}" if way else message  # of several fields, which it names
    if problem["type"] == "literal_error":
        message += nearest(problem["input"], re.findall("'([^']+)'", problem["ctx"]["expected"]))
    return f"{field}: {shown(problem['input'])} given; {message}"


def nearest(given: Any, known: Iterable[str]) -> str:
    """Suggest what was probably meant, as the end of a message; empty if nothing is near."""
    near = get_close_matches(given.lower(), list(known), n=1) if isinstance(given, str) else []
    return f"; did you mean {near[0]}?" if near else ""


def _is_hidden(part: int | str) -> bool:
    """Return whether a part of a path is the tag of a union that users do not write."""
    return isinstance(part, str) and part.startswith("<") and part.endswith(">")


def shown(value: Any) -> str:
    """Show a value in a message: on one line, and short."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, int) and abs(value) >= 10**_SHOWN:
        return "a number with very many digits"
    text = repr(value[: 2 * _SHOWN]) if isinstance(value, str) else repr(value)
    if len(text) <= _SHOWN:
        return text
    length = f" ({len(value)} characters)" if isinstance(value, str) else ""
    return f"{text[:_SHOWN]}…{text[0] if isinstance(value, str) else ''}{length}"


def _suggested(way: Sequence[int | str], model: type[BaseModel] | None) -> str:
    if model is None:
        return ""
    known = {name for one in _parts_at(model, way[:-1]) for name in one.model_fields}
    return nearest(str(way[-1]), sorted(known))


def _parts_at(model: type[BaseModel], way: Sequence[int | str]) -> list[type[BaseModel]]:
    """Models that may be at the end of the path `way`; a tag of a union chooses among them."""
    found = [model]
    for part in way:
        if isinstance(part, int) or _is_hidden(part):
            continue
        fields = [one.model_fields[part].annotation for one in found if part in one.model_fields]
        if fields:
            found = [one for annotation in fields for one in _models_in(annotation)]
        else:
            found = [one for one in found if part in _tags(one)]
    return found


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
        for inner in annotation.__subclasses__():  # a field of a base takes those made from it
            yield from _models_in(inner)
    elif get_origin(annotation) in (Annotated, Union, types.UnionType, list, tuple):
        for inner in get_args(annotation):
            yield from _models_in(inner)


def _tags(model: type[BaseModel]) -> tuple[Any, ...]:
    kind = model.model_fields.get("kind")
    return () if kind is None else get_args(kind.annotation)
