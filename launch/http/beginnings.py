"""Beginnings of extensions: the finished video that another one goes on with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from launch.http.assets import Store
from launch.http.errors import ApiError
from launch.http.profiles import extensible, profile_of
from launch.http.records import Record
from launch.http.video import VideoCreate
from launch.serve.entries import State
from runtime.jobs.job import Job
from runtime.request.config import Config
from runtime.request.video_request import Continuation

if TYPE_CHECKING:
    from launch.http.creation import Asked
    from launch.http.service import Service


@dataclass(frozen=True, slots=True)
class Before:
    """The video that another one begins with.

    Attributes:
        id: of the video.
        file: its latents.
        frames: its number of frames.
    """

    id: str
    file: Path
    frames: int

    def length(self, asked: VideoCreate, config: Config, fps: int) -> int:
        """Number of frames of both together.

        Raises:
            ApiError: the new part cannot have the length that was asked for.
        """
        step, given = config.bounds.frames, asked.frames
        if asked.seconds is not None:
            return self.frames + max(round(float(asked.seconds) * fps / step), 1) * step
        new = config.defaults.frames - 1 if given is None else given
        if new % step:
            low = new // step * step
            said = f"frames: {new} given; an extension adds a multiple of {step}, such as {low or step}"
            raise ApiError(400, "invalid_value", said, param="frames")
        return self.frames + new

    def lent(self, job: Job, store: Store, to: str) -> Job:
        """The job of the video `to` with latents of its own: this video may be deleted meanwhile.

        Raises:
            ApiError: it has just been deleted.
        """
        try:
            known = Continuation(file=str(store.lend_latents(self.id, to)), frames=self.frames)
        except FileNotFoundError:
            raise _gone(self.id) from None
        return replace(job, request=job.request.model_copy(update={"extend": known}))


def begun(service: Service, asked: Asked, owner: str) -> tuple[Asked, Before | None]:
    """What is asked for with all that an extension takes from the video that it begins with, and that video.

    Raises:
        ApiError: it is not there, not completed, or cannot be extended, or something else is wanted of it.
    """
    id = asked.fields.extends
    if id is None:
        return asked, None
    record = service.records.video(id, owner)
    _check_extensible(record)
    file = service.store.latents(id)
    if not file.is_file():
        raise _gone(id)
    if asked.image not in (None, record.image):
        said = "input_reference: an extension begins with a video, so it cannot have an image"
        raise ApiError(400, "invalid_value", said, param="input_reference")
    before = Before(id, file, record.details.frames)
    return replace(asked, fields=_adopted(asked.fields, record), image=record.image), before


def _check_extensible(record: Record) -> None:
    if record.entry.state in (State.WAITING, State.RUNNING):
        said = "the video is not ready; it can be extended when it is completed"
        raise ApiError(400, "video_not_ready", said, param="extends")
    if record.entry.state is not State.DONE:
        said = "there is no video to extend; its `error` says why"
        raise ApiError(400, "video_failed", said, param="extends")
    profile = profile_of(record.entry.job.config)
    if profile is not None and not extensible(profile):
        said = (
            f"{record.asked.model} makes videos from text alone, and cannot continue the latents of a video; "
            "make a longer video with the same seed, or a film of several shots"
        )
        raise ApiError(422, "unsupported", said, param="extends")


def _adopted(fields: VideoCreate, record: Record) -> VideoCreate:
    """The fields with model, size and frames per second of the video, which cannot be others."""
    own = {"model": record.asked.model, "size": record.size, "fps": record.details.fps}
    for name, value in own.items():
        given = getattr(fields, name)
        if given not in (None, value):
            said = f"{name}: {given!r} given; the video that is extended has {value!r}"
            raise ApiError(400, "invalid_value", said, param=name)
    return fields.model_copy(update=own)


def _gone(id: str) -> ApiError:
    said = f"the latents of {id!r} no longer exist, so it cannot be extended"
    return ApiError(404, "content_missing", said, param="extends")
