"""Estimates of time and quality, before a video is made."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from launch.http.auth import Caller
from launch.http.beginnings import begun
from launch.http.bodies import read_fields
from launch.http.catalog import calibration_for
from launch.http.creation import Asked, read_asked
from launch.http.expected import ExpectedRun, expected_run
from launch.http.keys import Key
from launch.http.lanes import TheLanes, in_lane
from launch.http.openapi import taking
from launch.http.profiles import settings_of
from launch.http.records import new_id
from launch.http.service import Service, TheService
from launch.http.video import VideoCreate
from runtime.files.text import read_json
from runtime.jobs.job import Job
from runtime.reports.step_seconds import read_window_seconds
from spectrum import StepKind, StepSeconds

router = APIRouter(prefix="/v1/videos", tags=["videos"])

_RECENT = 8  # videos whose times are looked at
_BESIDE = ("encode", "decode", "write")  # phases of a report that are no steps
_LIKE = (
    "SELECT videos.id FROM videos JOIN requests ON requests.id = videos.request "
    "WHERE requests.state = 'done' AND NOT videos.deleted AND videos.size = ? "
    "AND json_extract(videos.asked, '$.model') = ? AND json_extract(videos.details, '$.frames') = ? "
    "ORDER BY requests.ended DESC LIMIT ?"
)


class ExpectedQuality(BaseModel):
    """PSNR against the full sampler that a calibration expects, in dB, with its standard deviation."""

    expected: float
    deviation: float


class ExpectedTime(BaseModel):
    """Seconds that a replica is expected to need.

    Attributes:
        denoise: of all steps.
        total: with encoding, decoding and writing; None if it is not known.
        source: `measured` on videos of this model, size and length that this server made, or taken from the
            `calibration`, which may have been made on another machine.
    """

    denoise: float
    total: float | None
    source: Literal["measured", "calibration"]


class Estimate(BaseModel):
    """Estimate of what a request would become.

    Attributes:
        seconds: true length of the video, as text.
        spectrum: the forecasting preset.
        chosen: why this preset was chosen; None if the request names it, or what it may cost.
        nfe: number of steps that are to be computed; the schedules of some presets decide while they run.
        computed: those steps.
        exact: whether every step is computed.
        psnr: None without a calibration for the request.
        time: None if no times are known.
    """

    object: Literal["video.estimate"] = "video.estimate"
    model: str
    size: str
    frames: int
    fps: int
    seconds: str
    steps: int
    spectrum: str
    chosen: str | None
    nfe: int
    computed: list[Annotated[int, Field(ge=0)]]
    exact: bool
    psnr: ExpectedQuality | None
    time: ExpectedTime | None


@router.post("/estimate", openapi_extra=taking(VideoCreate, upload="input_reference"))
async def estimate(request: Request, service: TheService, key: Caller, lanes: TheLanes) -> Estimate:
    """Estimate a request: length, computed steps, expected time and quality. It is checked like a new video,
    but no video is made."""
    fields = await read_fields(request)
    return await in_lane(lanes.of(fields), _of_fields, service, key, fields)


def _of_fields(service: Service, key: Key, fields: dict[str, Any]) -> Estimate:
    return estimate_of(service, read_asked(service, fields, None), key.owner)


def estimate_of(service: Service, asked: Asked, owner: str) -> Estimate:
    """Estimate what a request of an owner would become.

    Raises:
        ApiError, BadRequestError: it cannot be made here.
    """
    asked, before = begun(service, asked, owner)
    fields = service.jobs.resolved(asked.fields)
    image = None if asked.image is None else service.store.image(asked.image)
    job = service.jobs.job(fields, service.store.video(new_id()), image, before)
    request, fps = job.request, job.config.fps
    expected = expected_run(settings_of(job.config), request, job.preset)
    times = _measured(service, job, fields.model or "") or _calibrated(job)
    return Estimate(
        model=fields.model or "",
        size=f"{request.width}x{request.height}",
        frames=request.frames,
        fps=fps,
        seconds=f"{request.frames / fps:.6g}",
        steps=request.steps,
        spectrum=request.preset,
        chosen=job.chosen or None,
        nfe=len(expected.computed),
        computed=expected.computed,
        exact=not job.preset.forecasts,
        psnr=_quality(expected),
        time=None if times is None else times.of(expected, request.deadline),
    )


def _quality(expected: ExpectedRun) -> ExpectedQuality | None:
    if expected.psnr is None or expected.deviation is None:
        return None
    return ExpectedQuality(expected=round(expected.psnr, 2), deviation=round(expected.deviation, 2))


@dataclass(frozen=True, slots=True)
class _Times:
    """Seconds of a window's steps, and of all that is no step."""

    window: StepSeconds
    beside: float | None
    source: Literal["measured", "calibration"]

    def of(self, expected: ExpectedRun, deadline: float | None) -> ExpectedTime:
        """Expected time of a request."""
        nfe = len(expected.computed)
        denoise = expected.windows * self.window.total(nfe, expected.steps - nfe)
        denoise = min(denoise, math.inf if deadline is None else deadline)
        total = None if self.beside is None else round(denoise + self.beside, 3)
        return ExpectedTime(denoise=round(denoise, 3), total=total, source=self.source)


def _measured(service: Service, job: Job, model: str) -> _Times | None:
    """Times of the last videos of the same model, size and length; None if there are none."""
    size = f"{job.request.width}x{job.request.height}"
    ids = service.queue.read(lambda row: str(row[0]), _LIKE, size, model, job.request.frames, _RECENT)
    found = list(_reported(service, ids))
    if not found:
        return None
    computed, forecast = (
        [seconds for steps, _ in found if (seconds := steps.of(kind)) is not None] for kind in StepKind
    )
    beside = statistics.median(beside for _, beside in found)
    return _Times(StepSeconds.medians(computed, forecast), beside, "measured")


def _reported(service: Service, ids: list[str]) -> Iterator[tuple[StepSeconds, float]]:
    """Seconds of a window's steps, and of all that is no step, of videos whose reports are there."""
    for id in ids:
        with suppress(OSError, ValueError, KeyError, TypeError):  # removed meanwhile
            told = read_json(service.store.video(id).with_suffix(".json"))
            yield read_window_seconds(told), sum(told["seconds"][part] for part in _BESIDE)


def _calibrated(job: Job) -> _Times | None:
    """Times that a calibration for such a request was made with; None if there is none."""
    found = calibration_for(job.config, job.request)
    return None if found is None else _Times(found.seconds.steps, None, "calibration")
