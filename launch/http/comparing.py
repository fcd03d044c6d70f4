"""Routes that compare a video with the one that the full sampler makes of the same request."""

from __future__ import annotations

import threading
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Response
from pydantic import BaseModel

from launch.http.auth import Caller
from launch.http.content import made
from launch.http.creation import Asked, accept
from launch.http.errors import ApiError
from launch.http.records import Record
from launch.http.service import Service, TheService
from launch.http.video import Video, VideoCreate
from launch.http.videos import VideoId, told
from runtime.media.frames import read_frames
from runtime.media.quality import compare_videos
from runtime.media.raw import raw_videos
from runtime.request.video_request import VideoRequest

router = APIRouter(prefix="/v1/videos", tags=["videos"])

_FULL = "off"
_MOST_BYTES = 2**30  # of the frames of one video that is measured
_measuring = threading.Lock()  # it takes all that a core can give
_SAME = (
    "SELECT videos.id FROM videos JOIN requests ON requests.id = videos.request "
    "WHERE videos.owner = ? AND NOT videos.deleted AND videos.asked = ? AND videos.image IS ? "
    "AND requests.state IN ('waiting', 'running', 'done') ORDER BY videos.number DESC LIMIT 1"
)


class MeasuredQuality(BaseModel):
    """Quality of a video against a reference, measured on the mp4 files, so their encoding counts as well.

    Attributes:
        psnr: dB; 100 for equal frames.
        ssim: 1 for equal frames.
        vmaf: None if this server's ffmpeg cannot measure it.
    """

    object: Literal["video.quality"] = "video.quality"
    id: str
    reference: str
    psnr: float
    ssim: float
    vmaf: float | None


@router.post("/{video_id}/full")
def full(video_id: VideoId, response: Response, service: TheService, key: Caller) -> Video:
    """Make the same video with every step computed, or return it if it exists or is already being made."""
    record = service.records.video(video_id, key.owner)
    if not record.entry.job.preset.forecasts:
        said = "every step of this video was computed; there is nothing to compare it with"
        raise ApiError(400, "video_is_full", said, param="video_id")
    wanted = _computed(record.asked)
    found = service.queue.read(
        lambda row: str(row[0]),
        _SAME,
        key.owner,
        wanted.model_dump_json(exclude={"input_reference"}),
        record.image,
    )
    if found:
        return told(service, service.records.video(found[0], key.owner), response)
    accepted, _ = accept(service, Asked(wanted, image=record.image), key)
    return told(service, accepted, response)


def _computed(asked: VideoCreate) -> VideoCreate:
    """The same request for the full sampler; what only matters to forecasts is left out."""
    left = dict.fromkeys(("nfe", "psnr", "deadline"))
    return asked.model_copy(update={**left, "spectrum": _FULL})


@router.get("/{video_id}/quality")
def quality(
    video_id: VideoId,
    reference: Annotated[str, Query(max_length=200, description="Video to compare with, by its `id`.")],
    service: TheService,
    key: Caller,
) -> MeasuredQuality:
    """Measure the quality of a video against another one of the same size and length."""
    one, other = (service.records.video(id, key.owner) for id in (video_id, reference))
    request = one.entry.job.request
    if _shape(request) != _shape(other.entry.job.request):
        said = f"reference: it has {_said(other)}, the video {_said(one)}; sizes and lengths must be equal"
        raise ApiError(400, "invalid_value", said, param="reference")
    if request.frames * request.height * request.width * 3 > _MOST_BYTES:
        said = f"reference: videos of {_said(one)} are too large to be compared here"
        raise ApiError(400, "invalid_value", said, param="reference")
    return _measure(service, one, other)


def _measure(service: Service, one: Record, other: Record) -> MeasuredQuality:
    files = [made(service, record) for record in (one, other)]
    with _measuring, raw_videos(one.entry.job.request, 2) as raw:
        for sink, file in zip(raw.sinks, files, strict=True):
            sink.write(read_frames(file))
        raw.flush()
        found = compare_videos(*raw.videos)
    return MeasuredQuality(
        id=one.id, reference=other.id, psnr=round(found.psnr, 2), ssim=round(found.ssim, 4), vmaf=found.vmaf
    )


def _shape(request: VideoRequest) -> tuple[int, int, int]:
    return request.width, request.height, request.frames


def _said(record: Record) -> str:
    width, height, frames = _shape(record.entry.job.request)
    return f"{frames} frames of {width}×{height}"
