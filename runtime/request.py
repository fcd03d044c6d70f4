"""What a user asks for: typed, bounded, refused at the door with one clear line per bad field."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from runtime.errors import BadRequestError

MAX_SEED = 2**63 - 1
BRANCHES = ("cond", "uncond")  # of classifier-free guidance


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be empty")
    return text


def _multiple_of_16(pixels: int) -> int:
    if pixels % 16:
        low = pixels // 16 * 16
        raise ValueError(f"must be a multiple of 16; the nearest are {low or 16} and {low + 16}")
    return pixels


def _latent_frames(frames: int) -> int:
    if frames % 4 != 1:
        low = (frames - 1) // 4 * 4 + 1
        raise ValueError(f"must be 4k + 1; the nearest are {max(low, 1)} and {max(low, 1) + 4}")
    return frames


class Waypoint(BaseModel):
    """A later prompt of a video whose prompt changes along the way.

    Attributes:
        at: where it is reached: 1 is the end of the video.
        prompt: what is shown there.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    at: Annotated[float, Field(gt=0, le=1)]
    prompt: Annotated[str, AfterValidator(_not_blank)]


def _ascending(points: tuple[Waypoint, ...]) -> tuple[Waypoint, ...]:
    if any(b.at <= a.at for a, b in pairwise(points)):
        raise ValueError("the places (at) must ascend")
    return points


class VideoRequest(BaseModel):
    """One generation: what to show, how large, how long, and how it is sampled.

    Attributes:
        prompt: what the video shows.
        image: path of the image that it begins with, for models that make videos from one.
        travel: later prompts of a video that is longer than the model's window; see `runtime.travel`.
        negative: what it should not show; used only with guidance above 1.
        width, height: pixels, multiples of 16.
        frames: pixel frames, 4k + 1.
        steps: sampler steps.
        guidance: classifier-free guidance scale; at most 1 means no guidance and no unconditional branch.
        seed: noise is drawn for the whole batch of videos from a CPU generator with this seed.
        max_sequence_length: text tokens. Wan attends to padding, so this is part of what is asked for.
        videos: how many videos to make from this prompt as one batch.
        spectrum: name of the forecasting preset, or path of a preset file.
        deadline: seconds that denoising may take; steps that do not fit are forecast. None: no bound.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: Annotated[str, AfterValidator(_not_blank)]
    image: str | None = None
    travel: Annotated[tuple[Waypoint, ...], AfterValidator(_ascending)] = ()
    negative: str = ""
    width: Annotated[int, Field(ge=16, le=8192), AfterValidator(_multiple_of_16)]
    height: Annotated[int, Field(ge=16, le=8192), AfterValidator(_multiple_of_16)]
    frames: Annotated[int, Field(ge=1, le=4001), AfterValidator(_latent_frames)]
    steps: Annotated[int, Field(ge=1, le=1000)]
    guidance: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] = 0
    max_sequence_length: Annotated[int, Field(ge=1, le=4096)] = 512
    videos: Annotated[int, Field(ge=1, le=64)] = 1
    spectrum: str = "off"
    deadline: Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)] | None = None

    @property
    def guided(self) -> bool:
        """Whether there is an unconditional branch (as `WanPipeline` decides it)."""
        return self.guidance > 1.0

    @property
    def full(self) -> Self:
        """The same with nothing forecast: what it is compared with."""
        return self.model_copy(update={"spectrum": "off", "deadline": None})

    @property
    def branches(self) -> tuple[str, ...]:
        """Names of the guidance branches that there are."""
        return BRANCHES if self.guided else BRANCHES[:1]

    @classmethod
    def parse(cls, **fields: Any) -> Self:
        """Validate `fields`.

        Raises:
            BadRequestError: one line per bad field: its name, what was given, what is allowed.
        """
        try:
            return cls(**fields)
        except ValidationError as error:
            raise BadRequestError(explain(error)) from None


def explain(error: ValidationError, source: str = "") -> str:
    """One line per bad field of a pydantic error: where it is, what was given, what is allowed."""
    lines = []
    for problem in error.errors(include_url=False):
        field = ".".join(str(part) for part in problem["loc"]) or "value"
        message = problem["msg"].removeprefix("Value error, ")
        message = message[:1].lower() + message[1:]
        if problem["type"] == "missing":
            lines.append(f"{field}: missing")
        elif problem["type"] == "extra_forbidden":
            lines.append(f"{field}: unknown field")
        else:
            lines.append(f"{field}: {problem['input']!r} given; {message.removeprefix('input ')}")
    prefix = f"{source}: " if source else ""
    return "\n".join(prefix + line for line in lines)
