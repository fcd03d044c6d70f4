"""Videos in the API: the request, and the object that clients receive."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from launch.http.keys import MOST_PRIORITY
from runtime.request.bounds import NUMBER
from runtime.request.video_request import MAX_SEED, FrameCount, Guidance, Prompt, StepCount, Text

_SIZE = "^[1-9][0-9]{0,4}x[1-9][0-9]{0,4}$"
_DAY = 86400.0


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


NAME_LETTERS = "letters, digits, . + : - and _"


def is_name(text: str) -> bool:
    """Whether a model, preset or LoRA can be offered under this name."""
    return len(text) <= 200 and re.fullmatch(r"[\w.+:-]+", text) is not None


def _named(text: str) -> str:
    if not is_name(text):
        raise ValueError(f"must be a name: {NAME_LETTERS}")
    return text


Name = Annotated[str, Field(max_length=200), AfterValidator(_named)]
"""Name of something that this server offers; never a path."""


class LoraChoice(_Part):
    """A LoRA by its name on this server, and its scale.

    Attributes:
        expert: of a model of two experts, the one for `high` or for `low` noise; by default both.
    """

    name: Name
    scale: Annotated[float, Field(ge=-1000, le=1000, allow_inf_nan=False), NUMBER] = 1.0
    expert: Annotated[Literal["high", "low"] | None, Field(exclude_if=lambda expert: expert is None)] = None


class ImageReference(_Part):
    """The image that a video starts from, as a data URL: `data:image/png;base64,…`."""

    image_url: Annotated[str, Field(max_length=28 * 2**20, pattern="^data:")]


def _as_lora(given: Any) -> Any:
    return {"name": given} if isinstance(given, str) else given


def _as_text(given: Any) -> Any:
    """Seconds are text in the contract, and numbers in most people's requests."""
    if isinstance(given, float):
        return f"{given:g}"
    return str(given) if isinstance(given, int) and not isinstance(given, bool) else given


Seconds = Annotated[
    str, BeforeValidator(_as_text), Field(pattern=r"^[0-9]{1,4}(\.[0-9]{1,6})?$", examples=["4"])
]


class VideoFields(_Part):
    """Settings of a video; those that are not given have the model's defaults.

    Attributes:
        model: one of `GET /v1/models`.
        seconds, frames: length of the video, one of the two; seconds are rounded to the nearest number of
            frames that the model can make, and the video's `seconds` are its true length.
        size: WIDTHxHEIGHT in pixels.
        input_reference: image that the video starts from, for models that take one; a file of a form, or a
            data URL.
        fps: frames per second.
        steps: steps of the sampler.
        guidance: scale of classifier-free guidance; 1 or less turns it off. Of a model of two experts it is
            that of the first, for high noise.
        guidance_2: scale of the second expert, for low noise, if it is to be another.
        negative: what the video should not show.
        seed: seed of the noise; random by default, and stated in the video's `request`.
        spectrum: name of a forecasting preset, or `off` to compute every step; by default the best that fits.
        nfe: instead of a preset: how many steps to compute. The best method of the model's calibration is
            chosen, and which steps it computes.
        psnr: instead of a preset: PSNR in dB against the full sampler. The fewest steps that are expected to
            reach it are computed.
        deadline: seconds that denoising may take; steps that do not fit are forecast.
        loras: LoRAs of this server, by name, each with its scale, and for one of two experts or for all.
        priority: requests of higher priority run first; at most your key's.
        expires: seconds from now after which the request is given up, waiting or running.
    """

    model: Name | None = None
    seconds: Seconds | None = None
    size: Annotated[str, Field(pattern=_SIZE, examples=["832x480"])] | None = None
    input_reference: ImageReference | None = None
    frames: FrameCount | None = None
    fps: Annotated[int, Field(ge=1, le=240), NUMBER] | None = None
    steps: StepCount | None = None
    guidance: Guidance | None = None
    guidance_2: Guidance | None = None
    negative: Text | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED), NUMBER] | None = None
    spectrum: Name | None = None
    nfe: Annotated[int, Field(ge=1, le=1000), NUMBER] | None = None
    psnr: Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False), NUMBER] | None = None
    deadline: Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False), NUMBER] | None = None
    loras: Annotated[list[Annotated[LoraChoice, BeforeValidator(_as_lora)]], Field(max_length=8)] = []
    priority: Annotated[int, Field(ge=-MOST_PRIORITY, le=MOST_PRIORITY), NUMBER] = 0
    expires: Annotated[float, Field(gt=0, le=3650 * _DAY, allow_inf_nan=False), NUMBER] | None = None

    @model_validator(mode="after")
    def _one_of_each(self) -> Self:
        if self.seconds is not None and self.frames is not None:
            raise ValueError("give seconds or frames, not both")
        budgets = [name for name in ("spectrum", "nfe", "psnr") if getattr(self, name) is not None]
        if len(budgets) > 1:
            raise ValueError(f"{' and '.join(budgets)} given; give one of them")
        return self


Id = Annotated[str, Field(max_length=200)]


_EXAMPLES: list[dict[str, Any]] = [
    {"prompt": "a red circle moving left", "seconds": "2", "seed": 7, "spectrum": "paper"},
    {
        "prompt": "a fox in the snow, by a river",
        "model": "wan2.2-t2v-14b-480p",
        "size": "832x480",
        "seconds": "5",
        "guidance": 4.0,
        "guidance_2": 3.0,
        "loras": [{"name": "high", "expert": "high"}, {"name": "low", "scale": 0.5, "expert": "low"}],
    },
]


class VideoCreate(VideoFields):
    """A request for a video. Only `prompt` is required.

    Attributes:
        extends: `id` of a completed video of yours that this one begins with. Its model, size, frames per
            second and image are used, and the length is that of the new part.
    """

    model_config = ConfigDict(json_schema_extra={"examples": _EXAMPLES})  # type: ignore[dict-item]

    prompt: Prompt
    extends: Id | None = None


class Remix(_Part):
    """A request to make a video again with a new prompt and everything else unchanged."""

    prompt: Prompt


class Extension(_Part):
    """What comes after a video; all else is as it was for that.

    Attributes:
        prompt: what the new part shows.
        seconds, frames: length of the new part, one of the two; by default that of the model's videos.
        seed: of the noise; by default that of the video.
    """

    prompt: Prompt
    seconds: Seconds | None = None
    frames: FrameCount | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED), NUMBER] | None = None


def _as_reference(given: Any) -> Any:
    return {"id": given} if isinstance(given, str) else given


class VideoReference(_Part):
    """A video of yours, by its `id`."""

    id: Id


class ExtensionOf(Extension):
    """An extension, with the video that it is of."""

    video: Annotated[VideoReference, BeforeValidator(_as_reference)]


Status = Literal["queued", "in_progress", "completed", "failed"]


class VideoError(BaseModel):
    """Reason why a video was not made."""

    code: str
    message: str


class RequestDetails(BaseModel):
    """All settings of a video, including those that its request did not give; `frames` counts all frames."""

    frames: int
    fps: int
    steps: int
    guidance: float
    guidance_2: float | None = None
    negative: str
    seed: int
    spectrum: str
    nfe: int | None = None
    psnr: float | None = None
    deadline: float | None = None
    loras: list[LoraChoice] = []
    image: bool = False
    extends: str | None = None
    priority: int = 0


class RunDetails(BaseModel):
    """Progress of a video.

    Attributes:
        position: number of requests before it; None once it has begun.
        step, steps: number of finished steps, and of all steps.
        nfe: steps that were computed since it began or was resumed; the others were forecast.
        seconds_left: expected seconds until the last step; they take into account which steps are forecast.
        tries: how often it was begun; more than once after a rank group or the server died.
        cancelling: whether it was cancelled and ends after the current step.
        preview: whether there is a preview.
    """

    position: int | None = None
    step: int = 0
    steps: int = 0
    nfe: int = 0
    seconds_left: float | None = None
    tries: int = 0
    cancelling: bool = False
    preview: bool = False


class Video(BaseModel):
    """A video, finished or not; times are seconds since the epoch.

    Attributes:
        seconds: true length of the video, as text.
        started_at: when a replica began with it.
        expires_at: when the video and its files are removed.
        film_id: id of the film for which it was made.
    """

    id: str
    object: Literal["video"] = "video"
    model: str
    status: Status
    progress: Annotated[int, Field(ge=0, le=100)]
    created_at: int
    started_at: int | None
    completed_at: int | None
    expires_at: int | None
    seconds: str
    size: str
    prompt: str
    remixed_from_video_id: str | None
    film_id: str | None
    error: VideoError | None
    request: RequestDetails
    run: RunDetails


class VideoList(BaseModel):
    """A page of videos; the next one has `after` = `last_id`."""

    object: Literal["list"] = "list"
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class VideoDeleted(BaseModel):
    """Response to the deletion of a video."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: Literal[True] = True
