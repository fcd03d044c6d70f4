"""Extensions: videos that begin with a finished one and go on from its last latents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool

from launch.http.auth import Caller
from launch.http.bodies import read_fields
from launch.http.content import made
from launch.http.creation import again, read_asked
from launch.http.errors import ApiError, read_model
from launch.http.keys import Key
from launch.http.once import IdempotencyKey
from launch.http.openapi import taking
from launch.http.records import Record
from launch.http.service import Service, TheService
from launch.http.video import Extension, ExtensionOf, Video
from launch.http.videos import VideoId, accepted

router = APIRouter(prefix="/v1/videos", tags=["videos"])

_OWN = {"prompt", "seconds", "frames", "extends", "input_reference"}  # what an extension has of its own
_PAGE = 100  # videos that are looked at together


@router.post("/extensions", openapi_extra=taking(ExtensionOf, upload="video"))
async def extend(
    request: Request, response: Response, service: TheService, key: Caller, idempotency: IdempotencyKey = None
) -> Video:
    """Extend a completed video, given by its `id` or as the very file that this server made."""
    fields = await read_fields(request)
    return await run_in_threadpool(_extend, service, key, fields, idempotency, response)


@router.post("/{video_id}/extensions", openapi_extra=taking(Extension))
async def extend_one(
    video_id: VideoId,
    request: Request,
    response: Response,
    service: TheService,
    key: Caller,
    idempotency: IdempotencyKey = None,
) -> Video:
    """Extend a completed video: another one that begins with it; its `seconds` count both."""
    fields = await read_fields(request)
    return await run_in_threadpool(_extend_one, service, key, video_id, fields, idempotency, response)


def _extend(
    service: Service, key: Key, fields: Mapping[str, Any], idempotency: str | None, response: Response
) -> Video:
    given, file = dict(fields), fields.get("video")
    if isinstance(file, bytes):
        given["video"] = {"id": _found(service, file, key.owner).id}
    asked = read_model(ExtensionOf, given)
    return _accepted(service, key, asked.video.id, asked, idempotency, response)


def _extend_one(
    service: Service,
    key: Key,
    id: str,
    fields: Mapping[str, Any],
    idempotency: str | None,
    response: Response,
) -> Video:
    return _accepted(service, key, id, read_model(Extension, fields), idempotency, response)


def _accepted(
    service: Service, key: Key, id: str, asked: Extension, idempotency: str | None, response: Response
) -> Video:
    """Accept an extension: what it does not say is as it was for the video."""
    before = again(service.records.video(id, key.owner), key).model_dump(exclude_none=True, exclude=_OWN)
    own = asked.model_dump(exclude_none=True, exclude={"video"})
    return accepted(service, read_asked(service, before | own | {"extends": id}, idempotency), key, response)


def _found(service: Service, file: bytes, owner: str) -> Record:
    """The video of an owner that this server made as this very file.

    Raises:
        ApiError: there is none: it has no latents that could be gone on from.
    """
    after, more = None, True
    while more:
        page, more = service.records.page(owner, after=after, limit=_PAGE, ascending=False)
        for record in page:
            if _is_made_as(service, record, file):
                return record
        after = page[-1].id if page else None
    said = (
        "video: this file is not one of your videos on this server. An extension needs latents, which a file "
        "does not have: give the id of a video, or the file exactly as it was downloaded"
    )
    raise ApiError(422, "unsupported", said, param="video")


def _is_made_as(service: Service, record: Record, file: bytes) -> bool:
    try:
        path = made(service, record)
        return path.stat().st_size == len(file) and path.read_bytes() == file
    except (ApiError, OSError):  # it is not there, or not any more
        return False
