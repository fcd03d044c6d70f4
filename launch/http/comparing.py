"""Routes that compare a video with the one that the full sampler makes of the same request."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Query, Response
from pydantic import BaseModel

from launch.http.auth import Caller
from launch.http.content import made
from launch.http.creation import Asked, accept, again
from launch.http.errors import ApiError
from launch.http.keys import Key
from launch.http.lanes import TheLanes, in_lane
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
    asked = Asked(_computed(again(record, key)), image=record.image, shared=True)
    return told(service, accept(service, asked, key)[0], response)


def _computed(asked: VideoCreate) -> VideoCreate:
    """The same request for the full sampler; what only matters to forecasts is left out."""
    left = dict.fromkeys(("nfe", "psnr", "deadline"))
    return asked.model_copy(update={**left, "spectrum": _FULL})


@router.get("/{video_id}/quality")
async def quality(
    video_id: VideoId,
    reference: Annotated[str, Query(max_length=200, description="Video to compare with, by its `id`.")],
    service: TheService,
    key: Caller,
    lanes: TheLanes,
) -> MeasuredQuality:
    """Measure the quality of a video against another one of the same size and length."""
    one, other = await in_lane(None, _comparable, service, key, video_id, reference)
    return await in_lane(lanes.measuring, _measure, service, one, other)


def _comparable(service: Service, key: Key, id: str, reference: str) -> tuple[Record, Record]:
    """A video and the one to compare it with.

    Raises:
        ApiError: one of them is not there or not finished, or they cannot be compared.
    """
    one, other = (service.records.video(id, key.owner) for id in (id, reference))
    request = one.entry.job.request
    if _shape(request) != _shape(other.entry.job.request):
        said = f"reference: it has {_said(other)}, the video {_said(one)}; sizes and lengths must be equal"
        raise ApiError(400, "invalid_value", said, param="reference")
    if request.frames * request.height * request.width * 3 > _MOST_BYTES:
        said = f"reference: videos of {_said(one)} are too large to be compared here"
        raise ApiError(400, "invalid_value", said, param="reference")
    for record in (one, other):
        made(service, record)
    return one, other


def _measure(service: Service, one: Record, other: Record) -> MeasuredQuality:
    files = [made(service, record) for record in (one, other)]
    with raw_videos(one.entry.job.request, 2) as raw:
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
