"""Descriptions of models' fields, which their docstrings have as a section `Attributes`."""

from __future__ import annotations

import inspect
import re

from pydantic import BaseModel

_SECTION = re.compile(r"\n+Attributes:\n(?P<fields>(?:    .*\n?)+)")
_FIELD = re.compile(r"^    (?P<names>\w[\w, ]*): (?P<text>.*(?:\n     +.*)*)", re.MULTILINE)


def described(model: type[BaseModel]) -> dict[str, str]:
    """Descriptions of a model's fields, those of the classes that it extends among them."""
    found: dict[str, str] = {}
    for one in reversed(model.__mro__):
        section = _SECTION.search(inspect.cleandoc(one.__doc__ or ""))
        for field in _FIELD.finditer(section["fields"]) if section else ():
            text = " ".join(field["text"].split())
            found |= dict.fromkeys(field["names"].split(", "), text)
    return {name: text for name, text in found.items() if name in model.model_fields}


def summary(description: str) -> str:
    """What a docstring says before and after its section `Attributes`."""
    return _SECTION.sub("\n", description).strip()
