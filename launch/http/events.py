"""Routes of server-sent events, which resume where a client left off (`Last-Event-ID`)."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from launch.http.auth import Caller
from launch.http.errors import ApiError
from launch.http.event_records import Event, read_events
from launch.http.hub import Hub
from launch.http.rendering import to_event
from launch.http.service import Service, TheService
from launch.http.videos import VideoId
from launch.serve.queue import QueueError

log = logging.getLogger("launch")

router = APIRouter(tags=["events"])

_MANY = 500  # events that are read at a time
_QUIET = 15.0  # seconds after which a comment shows that the stream is alive
_RETRY = 2000  # milliseconds after which a client comes back
_NUMBER = 2**63 - 1
_STREAM: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {}}, "description": "Events, one after another."},
    204: {"description": "The video has ended, and no event is left."},
}
LastEventId = Annotated[
    int | None,
    Header(alias="Last-Event-ID", ge=0, le=_NUMBER, description="Number of the last event that was seen."),
]
After = Annotated[
    int | None,
    Query(ge=0, le=_NUMBER, description="The same, for clients that cannot set the header; 0 for all."),
]


@router.get("/v1/events", response_class=StreamingResponse, responses=_STREAM)
async def events(
    request: Request, service: TheService, key: Caller, last: LastEventId = None, after: After = None
) -> Response:
    """Stream the events of all your videos, from now on or after the last one seen."""
    newest = await run_in_threadpool(service.queue.last_event)
    start = _start(last if last is not None else after, newest, otherwise=newest)
    return _Stream(request.app.state.hub, service, key.owner, None, start)


@router.get("/v1/videos/{video_id}/events", response_class=StreamingResponse, responses=_STREAM)
async def video_events(
    request: Request,
    video_id: VideoId,
    service: TheService,
    key: Caller,
    last: LastEventId = None,
    after: After = None,
) -> Response:
    """Stream the events of a video, from its first or after the last one seen, until it has ended."""
    record = await run_in_threadpool(service.records.video, video_id, key.owner)
    newest = await run_in_threadpool(service.queue.last_event)
    start = _start(last if last is not None else after, newest, otherwise=0)
    if record.ended and not await run_in_threadpool(_read, service, key.owner, video_id, start):
        return Response(status_code=204)  # browsers come back otherwise
    return _Stream(request.app.state.hub, service, key.owner, video_id, start)


def _start(given: int | None, newest: int, *, otherwise: int) -> int:
    """Number of the event after which a stream begins. One that is yet to come was seen of another queue."""
    if given is None:
        return otherwise
    return given if given <= newest else 0


def _read(service: Service, owner: str, video: str | None, after: int) -> list[Event]:
    return read_events(service.queue, owner, after=after, video=video, limit=_MANY)


class _Stream(StreamingResponse):
    """Response with events as they come, if its owner has not too many streams open."""

    def __init__(self, hub: Hub, service: Service, owner: str, video: str | None, after: int):
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        texts = _texts(hub, service, owner, video, after)
        super().__init__(texts, media_type="text/event-stream", headers=headers)
        self._hub, self._owner = hub, owner

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._hub.stream(self._owner):
            await super().__call__(scope, receive, send)


async def _texts(hub: Hub, service: Service, owner: str, video: str | None, after: int) -> AsyncIterator[str]:
    """The stream: events as they come, until the video has ended or the server ends."""
    yield f"retry: {_RETRY}\n\n"
    with _ended_by_trouble():
        while not hub.over:
            newest = await run_in_threadpool(service.queue.last_event)
            more = video is None or await run_in_threadpool(_is_open, service, owner, video)
            found = await run_in_threadpool(_read, service, owner, video, after)
            for event in found:
                yield _text(event)
            if len(found) == _MANY:
                after = found[-1].number
                continue
            if not more:  # when this was asked, its last event was there
                return
            after = max([after, newest, *(event.number for event in found)])
            if not await hub.wait(after, _QUIET):
                yield ":\n\n"


@contextmanager
def _ended_by_trouble() -> Iterator[None]:
    """End a stream quietly when the queue cannot be read: its client comes back, and misses nothing."""
    try:
        yield
    except QueueError as error:
        log.warning("a stream of events ends: %s", error)


def _is_open(service: Service, owner: str, video: str) -> bool:
    """Whether there may be more events of a video."""
    try:
        return not service.records.video(video, owner).ended
    except ApiError:  # it was deleted
        return False


def _text(event: Event) -> str:
    told = json.dumps(to_event(event))
    return f"id: {event.number}\nevent: {event.kind}\ndata: {told}\n\n"
