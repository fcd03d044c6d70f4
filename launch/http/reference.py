"""The API's description as a page for people: `/docs`, made from the OpenAPI description alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request, Response
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from launch.http.page import Cached, Known

router = APIRouter(include_in_schema=False)
_Schema = Mapping[str, Any]
_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


@dataclass(frozen=True, slots=True)
class Value:
    """A parameter, or a field of an object.

    Attributes:
        kinds: what it may be; names of schemas are among them.
        bounds: of a number, as text.
        default: as JSON; empty without one.
        place: `path`, `query` or `header` of a parameter.
    """

    name: str
    kinds: Sequence[str]
    bounds: str
    default: str
    required: bool
    description: str
    place: str = ""


@dataclass(frozen=True, slots=True)
class Operation:
    """A route with one method.

    Attributes:
        body: name of the schema of its body; None without one.
        media: media types of the body.
        answers: what it returns: names of schemas, or media types.
    """

    method: str
    path: str
    description: str
    parameters: Sequence[Value]
    body: str | None
    media: Sequence[str]
    answers: Sequence[str]

    @property
    def id(self) -> str:
        """Anchor of the operation."""
        return f"{self.method}-{self.path}"


@router.get("/docs")
def reference(request: Request, known: Known = None) -> Response:
    """Get the API's description as a page."""
    page: Cached = request.app.state.page
    return page.answer(known)


def page_of(told: _Schema) -> str:
    """Make the page of an OpenAPI description."""
    schemas = told["components"]["schemas"]
    return _TEMPLATES.get_template("reference.html").render(
        info=told["info"],
        groups=_groups(told["paths"]),
        schemas={name: (schema, _fields(schema), _examples(schema)) for name, schema in schemas.items()},
    )


def _groups(paths: _Schema) -> dict[str, list[Operation]]:
    """Operations by their tag, in the order of the routes."""
    found: dict[str, list[Operation]] = {}
    for path, methods in paths.items():
        for method, told in methods.items():
            found.setdefault(told["tags"][0], []).append(_operation(method.upper(), path, told))
    return found


def _operation(method: str, path: str, told: _Schema) -> Operation:
    content = told.get("requestBody", {}).get("content", {})
    body = next(_kinds(content["application/json"]["schema"])) if content else None
    answer = told["responses"]["200"].get("content", {})
    answers = [kind for media, of in answer.items() for kind in [*_kinds(of.get("schema", {}))] or [media]]
    parameters = [
        _value(one["name"], one["schema"], required=one["required"], place=one["in"], told=one)
        for one in told.get("parameters", ())
    ]
    return Operation(method, path, told.get("description", ""), parameters, body, [*content], answers)


def _fields(schema: _Schema) -> list[Value]:
    required = schema.get("required", ())
    return [
        _value(name, of, required=name in required, told=of)
        for name, of in schema.get("properties", {}).items()
    ]


def _value(name: str, schema: _Schema, *, required: bool, told: _Schema, place: str = "") -> Value:
    default = schema.get("default")
    return Value(
        name=name,
        kinds=[*_kinds(schema)],
        bounds=", ".join(_bounds(schema)),
        default="" if default is None else json.dumps(default),
        required=required,
        description=told.get("description", ""),
        place=place,
    )


def _kinds(schema: _Schema) -> Iterator[str]:
    """What a value of a schema may be, in words; a schema of its own by its name."""
    if "$ref" in schema:
        yield schema["$ref"].rpartition("/")[2]
    elif "anyOf" in schema or "oneOf" in schema:
        for one in schema.get("anyOf") or schema["oneOf"]:
            yield from _kinds(one)
    elif "const" in schema:
        yield json.dumps(schema["const"])
    elif "enum" in schema:
        yield from map(json.dumps, schema["enum"])
    elif schema.get("type") == "array":
        yield from (f"{kind}[]" for kind in _kinds(schema["items"]))
    elif "type" in schema:
        yield schema["type"]


def _bounds(schema: _Schema) -> Iterator[str]:
    for one in (schema, *schema.get("anyOf", ())):
        yield from (f"{sign} {one[name]}" for name, sign in _BOUNDS.items() if name in one)


def _examples(schema: _Schema) -> list[str]:
    return [json.dumps(one, indent=2) for one in schema.get("examples", ())]


def _coded(text: str) -> Markup:
    """Text as HTML, with what stands between backticks as code."""
    parts = enumerate(text.split("`"))
    return Markup("").join(
        Markup("<code>{}</code>" if number % 2 else "{}").format(part) for number, part in parts
    )


_TEMPLATES = Environment(
    loader=PackageLoader("launch.http", "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.filters["coded"] = _coded
