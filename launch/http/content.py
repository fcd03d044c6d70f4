"""Routes for the files of a video: the mp4, pictures, the preview and the report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Response
from fastapi.responses import FileResponse

from launch.http.assets import SPRITESHEET, THUMBNAIL
from launch.http.auth import Caller
from launch.http.errors import ApiError, without_paths
from launch.http.files import BINARY, RangedFile
from launch.http.lanes import TheLanes, in_lane
from launch.http.pictures import write_spritesheet, write_thumbnail
from launch.http.records import Record
from launch.http.service import Service, TheService
from launch.http.videos import VideoId
from launch.serve.entries import State
from launch.serve.previews import RequestPreviews
from runtime.errors import JobFailedError
from runtime.files.text import read_json

router = APIRouter(prefix="/v1/videos", tags=["videos"])

Variant = Literal["video", "thumbnail", "spritesheet", "picture"]
_PATHS = {"videos", "image", "file", "spectrum", "calibration", "name"}  # fields of reports that may hold one
_DRAWN = {"thumbnail": (THUMBNAIL, write_thumbnail), "spritesheet": (SPRITESHEET, write_spritesheet)}
"""Pictures that are made when they are first asked for: variant → file, and what writes it."""
_PREVIEW: dict[int | str, dict[str, Any]] = {
    200: {"content": {"image/webp": {}}, "description": "The preview."}
}


@router.get("/{video_id}/content", response_class=FileResponse, responses=BINARY)
async def content(
    video_id: VideoId,
    service: TheService,
    key: Caller,
    lanes: TheLanes,
    variant: Annotated[
        Variant, Query(description="`picture` shows the run: the time of each step.")
    ] = "video",
) -> RangedFile:
    """Get the mp4 of a finished video, its thumbnail, a contact sheet, or the picture of its run."""
    lane = lanes.drawing if variant in _DRAWN else None
    return await in_lane(lane, _content, service, key.owner, video_id, variant)


def _content(service: Service, owner: str, id: str, variant: Variant) -> RangedFile:
    path = _file(service, service.records.video(id, owner), variant)
    name = f"{id}{'' if variant == 'video' else f'-{variant}'}{path.suffix}"
    try:
        return RangedFile(path, name)
    except FileNotFoundError:  # it was there, and has just been removed, too
        raise _missing(id) from None


@router.get("/{video_id}/preview", response_class=Response, responses=_PREVIEW)
def preview(video_id: VideoId, service: TheService, key: Caller) -> Response:
    """Get the preview of a running video, an animated WebP; a `preview` event announces a new one."""
    record = service.records.video(video_id, key.owner)
    try:
        if record.entry.state is State.RUNNING and record.entry.progress.preview:
            seen = RequestPreviews(service.queue.folder).of(record.entry.id).path.read_bytes()
            return Response(seen, media_type="image/webp", headers={"Cache-Control": "no-store"})
    except FileNotFoundError:  # it has ended just now
        pass
    raise ApiError(404, "no_preview", "there is no preview of this video now")


@router.get("/{video_id}/report")
def report(video_id: VideoId, service: TheService, key: Caller) -> dict[str, Any]:
    """Get the report of a finished video: computed steps, times, errors, versions."""
    video = made(service, service.records.video(video_id, key.owner))
    try:
        told = read_json(video.with_suffix(".json"))
    except (OSError, ValueError):
        raise _missing(video_id) from None
    return {name: _of_names(value, name) for name, value in told.items()}


def _file(service: Service, record: Record, variant: Variant) -> Path:
    """The file of a variant; pictures of the video are made when they are first asked for."""
    video = made(service, record)
    match variant:
        case "video":
            return video
        case "picture":
            path = video.with_suffix(".png")
        case "thumbnail" | "spritesheet":
            name, write = _DRAWN[variant]
            path = video.with_name(name)
            if not path.is_file():
                try:
                    write(video, path, record.details.frames)
                except (FileNotFoundError, JobFailedError):
                    if not video.is_file():  # it was there, and has just been removed
                        raise _missing(record.id) from None
                    raise
    return path


def made(service: Service, record: Record) -> Path:
    """Path of the mp4 of a finished video."""
    match record.entry.state:
        case State.DONE:
            pass
        case State.WAITING | State.RUNNING:
            raise ApiError(400, "video_not_ready", "the video is not ready; ask again when it is completed")
        case _:
            raise ApiError(400, "video_failed", "there is no video; its `error` says why")
    video = service.store.video(record.id)
    if not video.is_file():
        raise _missing(record.id)
    return video


def _missing(id: str) -> ApiError:
    return ApiError(404, "content_missing", f"the files of {id!r} no longer exist")


def _of_names(told: Any, key: str = "") -> Any:
    """Keep of every path in a report only the name; texts of the user's stay as they are."""
    if isinstance(told, dict):
        return {name: _of_names(value, name) for name, value in told.items()}
    if isinstance(told, list):
        return [_of_names(value, key) for value in told]
    if key == "warnings":
        return without_paths(told)
    return Path(told).name if key in _PATHS and isinstance(told, str) else told
