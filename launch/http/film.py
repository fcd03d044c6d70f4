"""Films in the API: the request, and the object that clients receive."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from launch.http.video import Status, VideoError, VideoFields
from runtime.film.storyboard import Cut, Transition
from runtime.request.video_request import Prompt, Title

MOST_SHOTS = 200


class FilmShot(VideoFields):
    """A shot of a film: a video to be made, with fields of its own, or an existing video.

    Attributes:
        id: names the shot in messages.
        title: title of its chapter; by default the beginning of its prompt.
        transition: from the shot before: `{"kind": "cut"}` or `{"kind": "crossfade", "frames": 8}`.
        prompt: what it shows.
        video_id: one of your videos, to be used as the shot; it need not be completed.
    """

    id: Annotated[str, Field(max_length=100)] | None = None
    title: Title | None = None
    transition: Transition = Cut(kind="cut")
    prompt: Prompt | None = None
    video_id: Annotated[str, Field(max_length=200)] | None = None

    @model_validator(mode="after")
    def _made_or_there(self) -> Self:
        if (self.prompt is None) == (self.video_id is None):
            raise ValueError("give a prompt, or the video_id of a video; not both")
        given = self.model_fields_set - {"id", "title", "transition", "video_id"}
        if self.video_id is not None and given:
            raise ValueError(f"{', '.join(sorted(given))} given; an existing video has its own")
        return self


class FilmCreate(VideoFields):
    """A request for a film: a storyboard. Fields of videos apply to every shot that has none of its own.

    Attributes:
        title: of the film.
        shots: in order. They have one size and one number of frames per second.
    """

    title: Title
    shots: Annotated[list[FilmShot], Field(min_length=1, max_length=MOST_SHOTS)]


class FilmShotState(BaseModel):
    """A shot of a film as it is now.

    Attributes:
        start: second of the film at which it begins.
        fade: frames of the crossfade from the shot before; 0 for a cut.
    """

    model_config = ConfigDict(frozen=True)

    title: str
    video_id: str
    status: Status
    progress: int
    start: float
    seconds: float
    fade: int


class Film(BaseModel):
    """A film; times are seconds since the epoch.

    Attributes:
        progress: per cent, the mean over the shots; 100 only when the film is finished.
        expires_at: when the film is removed; its videos have times of their own.
    """

    id: str
    object: Literal["film"] = "film"
    title: str
    status: Status
    progress: int
    created_at: int
    completed_at: int | None
    expires_at: int | None
    seconds: str
    size: str
    error: VideoError | None
    shots: list[FilmShotState]


class FilmList(BaseModel):
    """A page of films; the next one has `after` = `last_id`."""

    object: Literal["list"] = "list"
    data: list[Film]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FilmDeleted(BaseModel):
    """Response to the deletion of a film."""

    id: str
    object: Literal["film.deleted"] = "film.deleted"
    deleted: Literal[True] = True
