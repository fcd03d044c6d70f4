"""Accepts videos: a request becomes a checked job and a record, both stored or neither."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from launch.http.beginnings import begun
from launch.http.errors import ApiError, read_model
from launch.http.keys import Key
from launch.http.once import once_of
from launch.http.records import NewVideo, Record, new_id
from launch.http.service import Service
from launch.http.video import RequestDetails, VideoCreate
from runtime.errors import BadRequestError
from runtime.jobs.job import Job

_DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,([A-Za-z0-9+/=\s]*)")


@dataclass(frozen=True, slots=True)
class Asked:
    """A request for a video, before it is accepted.

    Attributes:
        fields: as the client gave them.
        image: digest of the image that was sent, which is in the store.
        remixed: id of the video that it is a remix of.
        idempotency: the header Idempotency-Key; None without it.
        shared: whether a video of the same request that has not failed serves as well.
    """

    fields: VideoCreate
    image: str | None = None
    remixed: str | None = None
    idempotency: str | None = None
    shared: bool = False

    @property
    def once(self) -> tuple[str, str] | None:
        """The idempotency key, and a digest that repetitions of the same request have in common."""
        told = self.fields.model_dump(mode="json", exclude={"input_reference"})
        return once_of(self.idempotency, [told, self.image, self.remixed])


def read_asked(service: Service, fields: Mapping[str, Any], idempotency: str | None) -> Asked:
    """Read a request for a video from the fields of a body; an image in it is decoded and stored.

    Raises:
        ApiError, BadRequestError: one of them is unknown, missing or out of bounds.
    """
    given = dict(fields)
    upload = given.pop("input_reference", None) if isinstance(given.get("input_reference"), bytes) else None
    read = read_model(VideoCreate, given)
    if read.input_reference is not None:
        upload = _from_url(read.input_reference.image_url)
        read = read.model_copy(update={"input_reference": None})
    image = None if upload is None else service.store.add_image(upload)
    return Asked(read, image, idempotency=idempotency)


def _from_url(url: str) -> bytes:
    """The image in a data URL. Others are not fetched: this server may reach what its clients may not."""
    found = _DATA_URL.fullmatch(url)
    try:
        if found is not None:
            return base64.b64decode(found[1], validate=False)
    except binascii.Error:
        pass
    said = (
        "input_reference: only data URLs are accepted, data:image/png;base64,…; or upload the file in a form"
    )
    raise ApiError(400, "invalid_value", said, param="input_reference")


def again(record: Record, key: Key) -> VideoCreate:
    """The request of a video that is made again with a key, which may allow a lower priority only."""
    return record.asked.model_copy(update={"priority": min(record.asked.priority, key.priority)})


def accept(service: Service, asked: Asked, key: Key) -> tuple[Record, bool]:
    """Accept a video, or return the one that an earlier request made: one with the same idempotency key, or
    any that was the same if it is `shared`.

    Raises:
        ApiError, BadRequestError: the video cannot be made here, or not now; nothing is stored.
    """
    known = service.records.earlier(asked.once, key.owner)
    if known is None and asked.shared:
        known = service.records.like(asked.fields, asked.image, key.owner)
    if known is not None:  # whatever would be in the way of another one
        return known, True
    service.store.check_room()
    new, job = prepare(service, asked, key)
    try:
        record, replayed = service.records.accept(new, job, key)
    except (ApiError, BadRequestError):
        service.store.remove(new.id)
        raise
    if replayed:
        service.store.remove(new.id)
    return record, replayed


def prepare(service: Service, asked: Asked, key: Key, film: str | None = None) -> tuple[NewVideo, Job]:
    """Prepare the record and the checked job of a request; nothing is accepted yet.

    Args:
        film: id of the film that the video is for.

    Raises:
        ApiError, BadRequestError: it cannot be made here.
    """
    service.check_priority(asked.fields.priority, key.priority)
    id, once = new_id(), asked.once
    asked, before = begun(service, asked, key.owner)
    fields = service.jobs.resolved(asked.fields)
    image = None if asked.image is None else service.store.image(asked.image)
    job = service.jobs.job(fields, service.store.video(id), image, before)
    if before is not None:
        job = before.lent(job, service.store, id)
    size = f"{job.request.width}x{job.request.height}"
    details = _details(fields, job)
    new = NewVideo(
        id=id,
        asked=fields,
        details=details,
        size=size,
        image=asked.image,
        remixed=asked.remixed,
        film=film,
        idempotency=once,
        shared=asked.shared,
    )
    return new, job


def _details(fields: VideoCreate, job: Job) -> RequestDetails:
    request = job.request
    return RequestDetails(
        frames=request.frames,
        fps=job.config.fps,
        steps=request.steps,
        guidance=request.guidance,
        guidance_2=request.guidance_2,
        negative=request.negative,
        seed=request.seed,
        spectrum=request.preset,
        nfe=fields.nfe,
        psnr=fields.psnr,
        deadline=request.deadline,
        loras=fields.loras,
        image=request.image is not None,
        extends=fields.extends,
        priority=fields.priority,
    )
