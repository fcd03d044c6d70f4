"""Errors in the shape that OpenAI's clients read, whatever went wrong: `{"error": {"message", …}}`."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from launch.serve.queue import QueueError
from runtime.errors import BadRequestError, JobFailedError
from runtime.files.atomic import is_no_room
from runtime.files.problems import explain, explain_one

log = logging.getLogger("launch")

_Model = TypeVar("_Model", bound=BaseModel)
_FIELD = re.compile(r"([a-z_0-9]+)(?:\.[\w.]+)?: ")  # beginning of a refusal's line
_PATH = re.compile(r"""(?<=')/(?:[^'/]*/)*(?=[^'/]*')|(?<=")/(?:[^"/]*/)*(?=[^"/]*")""")  # in quotes
_PARAMS = {"width": "size", "height": "size", "image": "input_reference", "lora": "loras"}
_CODES = {"missing": "missing_required_parameter", "extra_forbidden": "unknown_parameter"}
_OF_STATUS = {404: "not_found", 405: "method_not_allowed"}
_KIND = "invalid_request_error"


class ErrorDetails(BaseModel):
    """Details of an error, for programs (`code`, `param`) and people (`message`)."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """Body of every response that is not a success."""

    error: ErrorDetails


class ApiError(Exception):
    """A refusal, or a failure that is reported to the client.

    Args:
        status: HTTP status.
        code: for programs, such as `video_not_found`.
        message: for people: what was given, and what to do.
        param: the field at fault.
        retry_after: seconds after which the same request may succeed; None if it will not, and clients that
            try again by themselves are told not to.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retry_after: float | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.code, self.param = status, code, param
        self.headers = dict(headers or {})
        if retry_after is not None:
            self.headers["Retry-After"] = str(max(1, round(retry_after)))
        self.headers["x-should-retry"] = str(retry_after is not None).lower()

    @property
    def response(self) -> JSONResponse:
        """HTTP response with this error."""
        kinds = {429: "rate_limit_error"}
        kind = kinds.get(self.status, _KIND if self.status < 500 else "server_error")
        param = None if self.param is None else _sendable(self.param)
        told = ErrorDetails(message=_sendable(str(self)), type=kind, param=param, code=self.code)
        return JSONResponse({"error": told.model_dump()}, self.status, self.headers)


def _sendable(text: str) -> str:
    """Text without halves of surrogate pairs, which a JSON string may hold and a response may not."""
    return text.encode(errors="backslashreplace").decode()


def not_found(kind: str, id: str) -> ApiError:
    """Make the error for something that does not exist or belongs to another owner."""
    return ApiError(404, f"{kind}_not_found", f"there is no {kind} {id[:80]!r}", param=f"{kind}_id")


def disk_full() -> ApiError:
    """Make the error for what there is no room for on the server's disk."""
    return ApiError(507, "disk_full", "the server's disk is almost full; nothing was accepted")


def refusal(error: BadRequestError) -> ApiError:
    """Make the error for a refusal by Lockstep, whose first line names the field."""
    message = without_paths(str(error))
    found = _FIELD.match(message)
    param = found[1] if found else None
    return ApiError(400, "invalid_value", message, param=_PARAMS.get(param or "", param))


def read_model(model: type[_Model], fields: Mapping[str, Any]) -> _Model:
    """Read the fields of a body.

    Raises:
        ApiError: some are missing, unknown or out of bounds; the first one counts.
    """
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        code = _CODES.get(first["type"], "invalid_value")
        param = ".".join(map(str, first["loc"]))[:200] or None
        raise ApiError(400, code, explain(error, model=model), param=param) from None


def without_paths(message: str) -> str:
    """Shorten every absolute path in a text to its name, as clients must not see the server's folders."""
    return _PATH.sub("", message)


def tell_errors(app: FastAPI) -> None:
    """Make the app answer every error in the shape that OpenAI's clients read."""
    app.add_exception_handler(ApiError, _told)
    app.add_exception_handler(BadRequestError, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _by_status)
    app.add_exception_handler(QueueError, _unavailable)
    app.add_exception_handler(ClientDisconnect, _gone)
    app.add_exception_handler(OSError, _written)
    app.add_exception_handler(JobFailedError, _written)
    app.add_exception_handler(Exception, _failed)


def _told(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return error.response


def _refused(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, BadRequestError)
    return refusal(error).response


def _invalid(request: Request, error: Exception) -> JSONResponse:
    """Values in the path or the query that are out of bounds."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    way = first["loc"][1:] or first["loc"]
    message = explain_one({"input": None, **first}, way)
    return ApiError(400, "invalid_value", message, param=str(way[-1])).response


def _by_status(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    status, asked = error.status_code, f"{request.method} {request.url.path[:200]}"
    code = _OF_STATUS.get(status, "bad_request" if status < 500 else "server_error")
    message = f"{asked}: {error.detail if status == 400 else HTTPStatus(status).phrase.lower()}"
    return ApiError(status, code, message, headers=error.headers).response


def _unavailable(request: Request, error: Exception) -> JSONResponse:
    """The queue's file is locked or its disk is full: that may pass."""
    log.warning("%s", error)
    said = "the queue cannot be used now; try again"
    return ApiError(503, "queue_unavailable", said, retry_after=5).response


def _written(request: Request, error: Exception) -> JSONResponse:
    """A file could not be written: as the disk is full, or by a defect."""
    if is_no_room(error) or is_no_room(error.__cause__):
        log.warning("%s", error)
        return disk_full().response
    raise error


def _gone(request: Request, error: Exception) -> JSONResponse:
    """The client left while it was sending; nobody reads this."""
    return ApiError(400, "incomplete_body", "the body ended too early").response


def _failed(request: Request, error: Exception) -> JSONResponse:
    """A defect of ours: the log has it, the client learns that it was not theirs."""
    said = "an unexpected error of the server; its log has the details"
    return ApiError(500, "server_error", said).response
