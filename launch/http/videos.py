"""Routes of `/v1/videos`: those that OpenAI's client uses, and further ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from launch.http.auth import Caller
from launch.http.bodies import read_fields
from launch.http.creation import Asked, accept, again, read_asked
from launch.http.errors import read_model
from launch.http.lanes import TheLanes, in_lane
from launch.http.once import REPLAYED, IdempotencyKey
from launch.http.openapi import taking
from launch.http.records import Record
from launch.http.rendering import poll_after_ms, to_video
from launch.http.service import Service, TheService
from launch.http.video import Remix, Video, VideoCreate, VideoDeleted, VideoList

router = APIRouter(prefix="/v1/videos", tags=["videos"])

VideoId = Annotated[str, Path(max_length=200, description="The video's `id`.")]
_POLL = "openai-poll-after-ms"


def told(service: Service, record: Record, response: Response) -> Video:
    """Make the object of a video, and set the header that says when to poll again."""
    after = poll_after_ms(record)
    if after is not None:
        response.headers[_POLL] = str(after)
    return to_video(record, service.bounds.keep)


@router.post("", openapi_extra=taking(VideoCreate, upload="input_reference"))
async def create(
    request: Request,
    response: Response,
    service: TheService,
    key: Caller,
    lanes: TheLanes,
    idempotency: IdempotencyKey = None,
) -> Video:
    """Create a video. It is `queued` until a replica begins with it."""
    fields = await read_fields(request)
    return await in_lane(lanes.of(fields), _create, service, key, fields, idempotency, response)


def _create(
    service: Service, key: Caller, fields: dict[str, Any], idempotency: str | None, response: Response
) -> Video:
    return accepted(service, read_asked(service, fields, idempotency), key, response)


def accepted(service: Service, asked: Asked, key: Caller, response: Response) -> Video:
    """Accept a video and answer with it; a header tells that an earlier request had made it."""
    record, replayed = accept(service, asked, key)
    if replayed:
        response.headers[REPLAYED] = "true"
    return told(service, record, response)


@router.get("")
def list_videos(
    service: TheService,
    key: Caller,
    after: Annotated[str | None, Query(max_length=200, description="Last video of the page before.")] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> VideoList:
    """List your videos, newest first unless `order` is `asc`."""
    page, more = service.records.page(key.owner, after=after, limit=limit, ascending=order == "asc")
    videos = [to_video(record, service.bounds.keep) for record in page]
    first, last = (videos[0].id, videos[-1].id) if videos else (None, None)
    return VideoList(data=videos, first_id=first, last_id=last, has_more=more)


@router.get("/{video_id}")
def retrieve(video_id: VideoId, response: Response, service: TheService, key: Caller) -> Video:
    """Get a video as it is now."""
    return told(service, service.records.video(video_id, key.owner), response)


@router.delete("/{video_id}")
def delete(video_id: VideoId, service: TheService, key: Caller) -> VideoDeleted:
    """Delete a video with its files; one that is being made is cancelled and frees its ranks after a step."""
    record = service.records.delete(video_id, key.owner)
    if record.ended:
        service.store.remove(video_id)
    return VideoDeleted(id=video_id)


@router.post("/{video_id}/cancel")
def cancel(video_id: VideoId, response: Response, service: TheService, key: Caller) -> Video:
    """Cancel a video: a waiting one ends at once, a running one after a step. It can be resumed."""
    return told(service, service.records.cancel(video_id, key.owner), response)


@router.post("/{video_id}/resume")
def resume(video_id: VideoId, response: Response, service: TheService, key: Caller) -> Video:
    """Resume a video that failed or was cancelled, from its last checkpoint."""
    service.store.check_room()
    return told(service, service.records.resume(video_id, key), response)


@router.post("/{video_id}/remix", openapi_extra=taking(Remix))
async def remix(
    video_id: VideoId,
    request: Request,
    response: Response,
    service: TheService,
    key: Caller,
    idempotency: IdempotencyKey = None,
) -> Video:
    """Make a video again with a new prompt and everything else unchanged, including its seed."""
    fields = await read_fields(request)
    return await run_in_threadpool(_remix, service, key, video_id, fields, idempotency, response)


def _remix(
    service: Service,
    key: Caller,
    video_id: str,
    fields: dict[str, Any],
    idempotency: str | None,
    response: Response,
) -> Video:
    prompt = read_model(Remix, fields).prompt
    before = service.records.video(video_id, key.owner)
    fields = {**again(before, key).model_dump(exclude_none=True), "prompt": prompt}
    asked = read_asked(service, fields, idempotency)
    return accepted(service, replace(asked, image=before.image, remixed=video_id), key, response)
