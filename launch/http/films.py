"""Routes of `/v1/films`: storyboards whose shots are videos, joined when all of them are finished."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.responses import FileResponse

from launch.http.assets import FILM, POSTER, SHEET
from launch.http.auth import Caller
from launch.http.bodies import read_fields
from launch.http.creation import prepare, read_asked
from launch.http.errors import ApiError, read_model, refusal
from launch.http.files import BINARY, RangedFile
from launch.http.film import Film, FilmCreate, FilmDeleted, FilmList, FilmShot
from launch.http.film_records import FilmRecords, NewShot
from launch.http.film_rendering import to_film
from launch.http.keys import Key
from launch.http.lanes import TheLanes, in_lane
from launch.http.once import REPLAYED, IdempotencyKey, once_of
from launch.http.openapi import taking
from launch.http.records import new_id
from launch.http.service import Service, TheService
from runtime.errors import BadRequestError
from runtime.film.storyboard import Crossfade

router = APIRouter(prefix="/v1/films", tags=["films"])

FilmId = Annotated[str, Path(max_length=200, description="The film's `id`.")]
_FILES = {"video": FILM, "thumbnail": POSTER, "spritesheet": SHEET}
_OWN = {"id", "title", "transition", "video_id"}  # fields of a shot that are no video's
_TITLE = 60  # characters of a prompt that make a title
_EITHER = (("seconds", "frames"), ("spectrum", "nfe", "psnr"))  # of these, one is given


@router.post("", openapi_extra=taking(FilmCreate))
async def create_film(
    request: Request,
    response: Response,
    service: TheService,
    key: Caller,
    lanes: TheLanes,
    idempotency: IdempotencyKey = None,
) -> Film:
    """Create a film. Each shot that is to be made becomes a video; all are accepted or none."""
    fields = await read_fields(request)
    return await in_lane(lanes.of(fields), _create, service, key, fields, idempotency, response)


def _create(
    service: Service, key: Key, fields: Mapping[str, Any], idempotency: str | None, response: Response
) -> Film:
    asked, films = read_model(FilmCreate, fields), FilmRecords(service.records)
    once = once_of(idempotency, ["film", asked.model_dump(mode="json")])
    id = films.earlier(once, key.owner)
    replayed = id is not None
    if id is None:
        service.store.check_room()
        new = new_id("film")
        shots = [_shot(service, key, asked, number, new) for number in range(len(asked.shots))]
        _check_join(service, key, shots)
        id = films.accept(new, asked.title, shots, key, once)
        replayed = id != new
    if replayed:
        response.headers[REPLAYED] = "true"
    return to_film(films.film(id, key.owner), service.bounds.keep)


def _shot(service: Service, key: Key, film: FilmCreate, number: int, id: str) -> NewShot:
    """Make a shot of what was asked for; messages name it."""
    shot = film.shots[number]
    fade = shot.transition.frames if isinstance(shot.transition, Crossfade) else 0
    try:
        if shot.video_id is not None:
            record = service.records.video(shot.video_id, key.owner)
            return NewShot(record.id, _title(shot, record.asked.prompt), fade)
        new, job = prepare(service, read_asked(service, _fields(film, shot), None), key, film=id)
    except BadRequestError as error:
        raise _of_shot(refusal(error), number) from None
    except ApiError as error:
        raise _of_shot(error, number) from None
    return NewShot(new.id, _title(shot, new.asked.prompt), fade, (new, job))


def _fields(film: FilmCreate, shot: FilmShot) -> dict[str, Any]:
    """Fields of a shot's video: its own, and the film's where it has none."""
    own = shot.model_dump(exclude_unset=True, exclude=_OWN)
    usual = film.model_dump(exclude_unset=True, exclude={"title", "shots"})
    for group in _EITHER:
        if any(own.get(name) is not None for name in group):
            usual = {name: value for name, value in usual.items() if name not in group}
    return usual | own


def _title(shot: FilmShot, prompt: str) -> str:
    """Title of a shot's chapter."""
    return shot.title or " ".join(prompt.split())[:_TITLE]


def _of_shot(error: ApiError, number: int) -> ApiError:
    """The same error, with the shot that it is of."""
    param = f"shots.{number}" + ("" if error.param is None else f".{error.param}")
    return ApiError(error.status, error.code, f"shot {number + 1}: {error}", param=param)


def _check_join(service: Service, key: Key, shots: Sequence[NewShot]) -> None:
    """Refuse shots that cannot be joined.

    Raises:
        ApiError: they differ in size or frames per second, or a shot fades for longer than it lasts.
    """
    known = {shot.video: service.records.video(shot.video, key.owner) for shot in shots if shot.made is None}
    found = [known[shot.video] if shot.made is None else shot.made[0] for shot in shots]
    for number, (shot, video) in enumerate(zip(shots, found, strict=True)):
        if (video.size, video.details.fps) != (found[0].size, found[0].details.fps):
            said = (
                f"it is {video.size} at {video.details.fps} frames per second, the first shot "
                f"{found[0].size} at {found[0].details.fps}"
            )
            raise _of_shot(ApiError(400, "invalid_value", said), number)
        leaving = shots[number + 1].fade if number + 1 < len(shots) else 0
        if number == 0 and shot.fade:
            raise _of_shot(ApiError(400, "invalid_value", "there is no shot before it to fade from"), number)
        if shot.fade + leaving >= video.details.frames:
            said = f"{shot.fade + leaving} of its frames would fade, but it has only {video.details.frames}"
            raise _of_shot(ApiError(400, "invalid_value", said), number)


@router.get("")
def list_films(
    service: TheService,
    key: Caller,
    after: Annotated[str | None, Query(max_length=200, description="Last film of the page before.")] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> FilmList:
    """List your films, newest first unless `order` is `asc`."""
    page, more = FilmRecords(service.records).page(
        key.owner, after=after, limit=limit, ascending=order == "asc"
    )
    films = [to_film(film, service.bounds.keep) for film in page]
    first, last = (films[0].id, films[-1].id) if films else (None, None)
    return FilmList(data=films, first_id=first, last_id=last, has_more=more)


@router.get("/{film_id}")
def retrieve_film(film_id: FilmId, service: TheService, key: Caller) -> Film:
    """Get a film as it is now."""
    return to_film(FilmRecords(service.records).film(film_id, key.owner), service.bounds.keep)


@router.get("/{film_id}/content", response_class=FileResponse, responses=BINARY)
def film_content(
    film_id: FilmId,
    service: TheService,
    key: Caller,
    variant: Literal["video", "thumbnail", "spritesheet"] = "video",
) -> RangedFile:
    """Get the mp4 of a finished film with its chapters, its poster, or frames of every shot."""
    film = FilmRecords(service.records).film(film_id, key.owner)
    if film.ended is None:
        raise ApiError(400, "film_not_ready", "the film is not ready; ask again when it is completed")
    if film.problem:
        raise ApiError(400, "film_failed", "there is no film; its `error` says why")
    path = service.store.film(film.id) / _FILES[variant]
    name = f"{_file_name(film.title)}{'' if variant == 'video' else f'-{variant}'}{path.suffix}"
    try:
        return RangedFile(path, name)
    except FileNotFoundError:
        raise ApiError(404, "content_missing", f"the files of {film_id!r} no longer exist") from None


def _file_name(title: str) -> str:
    """A file's name for a film."""
    return FilePath(re.sub(r"[^\w-]+", "-", title).strip("-")).name or "film"


@router.post("/{film_id}/cancel")
def cancel_film(film_id: FilmId, service: TheService, key: Caller) -> Film:
    """Cancel all videos of a film that have not ended."""
    films = FilmRecords(service.records)
    for shot in films.film(film_id, key.owner).shots:
        if shot.record is not None and not shot.record.ended:
            service.records.cancel(shot.video, key.owner)
    return to_film(films.film(film_id, key.owner), service.bounds.keep)


@router.post("/{film_id}/resume")
def resume_film(film_id: FilmId, service: TheService, key: Caller) -> Film:
    """Resume a film that has failed: its failed and cancelled videos resume from their last checkpoints, all
    of them or none."""
    films = FilmRecords(service.records)
    film = films.film(film_id, key.owner)
    if not film.problem:
        raise ApiError(400, "film_not_resumable", "only a film that has failed can be resumed")
    for number, shot in enumerate(film.shots, 1):
        if shot.record is None:
            said = f"the video of shot {number} was deleted, so the film cannot be finished"
            raise ApiError(400, "film_not_resumable", said)
    service.store.check_room()
    films.resume(film, key)
    return to_film(films.film(film_id, key.owner), service.bounds.keep)


@router.delete("/{film_id}")
def delete_film(film_id: FilmId, service: TheService, key: Caller) -> FilmDeleted:
    """Delete a film. Its videos are kept, and those that are being made are finished."""
    films = FilmRecords(service.records)
    films.delete(films.film(film_id, key.owner).id)
    service.store.remove(film_id)
    return FilmDeleted(id=film_id)
