"""The OpenAPI description: bodies that are read as JSON or as a form, and the shape of errors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from launch.http.docstrings import described, summary
from launch.http.errors import ErrorBody

_AT = "#/components/schemas/"
_TELLS = {"application/json": {"schema": {"$ref": f"{_AT}{ErrorBody.__name__}"}}}
_ERRORS = {
    "4XX": {"description": "The request cannot be served as it stands.", "content": _TELLS},
    "5XX": {"description": "The server cannot serve it now.", "content": _TELLS},
}


def taking(model: type[BaseModel], upload: str | None = None) -> dict[str, Any]:
    """Describe a route's body, which has the fields of `model`, as JSON or as a form (for `openapi_extra`).

    Args:
        upload: name of the field that a form may send as a file.
    """
    schema: dict[str, Any] = {"$ref": f"{_AT}{model.__name__}"}
    form = schema
    if upload is not None:
        form = {"anyOf": [schema, {"type": "object", "properties": {upload: {"format": "binary"}}}]}
    content = {"application/json": {"schema": schema}, "multipart/form-data": {"schema": form}}
    return {"requestBody": {"required": True, "content": content}}


def describe(app: FastAPI, bodies: Sequence[type[BaseModel]]) -> None:
    """Make the app serve its OpenAPI description at `/openapi.json`.

    Args:
        bodies: models of the bodies that routes are `taking`.
    """

    def described() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _described(app, bodies)
        return app.openapi_schema

    app.openapi = described  # type: ignore[method-assign]


def _described(app: FastAPI, bodies: Sequence[type[BaseModel]]) -> dict[str, Any]:
    told = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    models: list[type[BaseModel]] = [ErrorBody, *bodies]
    _, added = models_json_schema([(one, "validation") for one in models], ref_template=_AT + "{model}")
    told["components"]["schemas"] |= added["$defs"]
    for name in ("HTTPValidationError", "ValidationError"):
        told["components"]["schemas"].pop(name, None)
    _describe_fields(told["components"]["schemas"])
    for way in told["paths"].values():
        for operation in way.values():
            operation["responses"].pop("422", None)
            operation["responses"] |= _ERRORS
    return told


def _describe_fields(schemas: dict[str, Any]) -> None:
    """Give each field the description that its model's docstring has of it."""
    for model in _subclasses(BaseModel):
        schema = schemas.get(model.__name__, {})
        if not model.__module__.startswith(__package__) or "properties" not in schema:
            continue
        schema["description"] = summary(schema.get("description", ""))
        for name, text in described(model).items():
            schema["properties"][name]["description"] = text


def _subclasses(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    for one in model.__subclasses__():
        yield one
        yield from _subclasses(one)
