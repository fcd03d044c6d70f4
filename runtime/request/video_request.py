"""Video requests: typed and bounded; a bad one is refused with one clear line per bad field."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from runtime.errors import BadRequestError
from runtime.files.problems import explain
from runtime.files.text import no_text
from runtime.request.bounds import NUMBER, Bounds

MAX_SEED = 2**63 - 1
BRANCHES = ("cond", "uncond")  # branches of classifier-free guidance


MOST_TEXT, MOST_TITLE, MOST_PATH = 20_000, 500, 4096  # characters


def _is_text(most: int) -> AfterValidator:
    """Validator that refuses text of more than `most` characters, or with ones that no report can hold."""

    def check(text: str) -> str:
        if len(text) > most:
            raise ValueError(f"must have at most {most} characters, it has {len(text)}")
        found = no_text(text)
        if found is not None:
            raise ValueError(f"must be text; at character {found[0] + 1} it has {found[1]}")
        return text

    return AfterValidator(check)


def _not_blank(text: str) -> str:
    if not any(one.isprintable() and not one.isspace() for one in text):
        raise ValueError("must not be empty")
    return text


def _one_line(text: str) -> str:
    text = text.strip()
    if "\n" in text or "\r" in text:
        raise ValueError("must be a single line")
    return text


Text = Annotated[str, _is_text(MOST_TEXT)]
Prompt = Annotated[str, _is_text(MOST_TEXT), AfterValidator(_not_blank)]
Title = Annotated[str, _is_text(MOST_TITLE), AfterValidator(_one_line), AfterValidator(_not_blank)]
FileName = Annotated[str, _is_text(MOST_PATH), AfterValidator(_not_blank)]
Pixels = Annotated[int, Field(ge=16, le=8192), NUMBER]
FrameCount = Annotated[int, Field(ge=1, le=4001), NUMBER]
StepCount = Annotated[int, Field(ge=1, le=1000), NUMBER]
Guidance = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False), NUMBER]
TextTokens = Annotated[int, Field(ge=1, le=4096), NUMBER]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED), NUMBER]
VideoCount = Annotated[int, Field(ge=1, le=64), NUMBER]
Deadline = Annotated[float, Field(ge=0.01, le=1e9, allow_inf_nan=False), NUMBER]


class Waypoint(BaseModel):
    """A later prompt of a video whose prompt changes over time.

    Attributes:
        at: time at which the prompt is reached, as a fraction of the video: 1 is its end.
        prompt: what the video shows there.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    at: Annotated[float, Field(gt=0, le=1), NUMBER]
    prompt: Prompt


def _ascending(points: tuple[Waypoint, ...]) -> tuple[Waypoint, ...]:
    if any(b.at <= a.at for a, b in pairwise(points)):
        raise ValueError("the times (at) must be in ascending order")
    return points


class Continuation(BaseModel):
    """The beginning of a longer video: one that is finished, as its clean latents.

    Attributes:
        file: path of its latents; see `runtime.media.latents`.
        frames: its number of frames.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: FileName
    frames: FrameCount


Waypoints = Annotated[tuple[Waypoint, ...], Field(max_length=1000), AfterValidator(_ascending)]


class VideoRequest(BaseModel):
    """A request for videos: their content, size and length, and how they are sampled.

    Attributes:
        prompt: what the video shows.
        image: path of the image that the video starts from, for image-to-video models.
        extend: finished video that this one goes on with, of the same size; `frames` counts both.
        travel: later prompts of a video that is longer than the model's window; see `sampling.travel`.
        negative: what the video should not show; used only with guidance above 1.
        width, height: pixels, in multiples that the model family has: see `Bounds`.
        frames: pixel frames, in a number that the model family can make.
        steps: sampler steps.
        guidance: classifier-free guidance scale; at most 1 means no guidance and no unconditional branch. Of
            a model of two experts it is that of the first, for high noise.
        guidance_2: scale of the second expert, for low noise; None for that of the first.
        embedded: whether the scale is an input of the transformer, as the model family has it.
        seed: noise is drawn for the whole batch of videos from a CPU generator with this seed.
        max_sequence_length: text tokens. Wan attends to padding, so this affects the result.
        videos: number of videos to make from this prompt, as one batch.
        spectrum: name of the forecasting preset, or path of a preset file; `auto` leaves the choice open.
        deadline: seconds that denoising may take; steps that do not fit are forecast. None for no bound.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: Prompt
    image: FileName | None = None
    extend: Annotated[Continuation | None, Field(exclude_if=lambda extend: extend is None)] = None
    travel: Waypoints = ()
    negative: Text = ""
    width: Pixels
    height: Pixels
    frames: FrameCount
    steps: StepCount
    guidance: Guidance
    guidance_2: Annotated[Guidance | None, Field(exclude_if=lambda scale: scale is None)] = None
    embedded: Annotated[bool, Field(exclude_if=lambda embedded: not embedded)] = False
    seed: Seed = 0
    max_sequence_length: TextTokens = 512
    videos: VideoCount = 1
    spectrum: FileName = "off"
    deadline: Deadline | None = None

    @model_validator(mode="after")
    def _goes_on(self) -> Self:
        if self.extend is None:
            return self
        if self.frames <= self.extend.frames:
            raise ValueError(
                f"frames: {self.frames} given; the video that is extended has {self.extend.frames} already"
            )
        if self.travel:
            raise ValueError("travel: a video that is extended takes one prompt")
        return self

    @property
    def continues(self) -> bool:
        """Whether each window continues the one before: the video begins with an image or another video."""
        return self.image is not None or self.extend is not None

    @property
    def guided(self) -> bool:
        """True if there is an unconditional branch, as diffusers' pipelines decide it."""
        return self.guidance > 1.0 and not self.embedded

    @property
    def scale(self) -> float:
        """Guidance scale that the result depends on; 1 without guidance."""
        return self.guidance if self.guided or self.embedded else 1.0

    @property
    def second_guidance(self) -> float:
        """Guidance scale of a second expert, which is used if the first has guidance."""
        return self.guidance if self.guidance_2 is None else self.guidance_2

    @property
    def second_scale(self) -> float:
        """Guidance scale of a second expert that the result depends on; 1 without guidance."""
        return self.second_guidance if self.guided or self.embedded else 1.0

    @property
    def preset(self) -> str:
        """Name of its preset; of a file, the file's name without its suffix."""
        named = self.spectrum
        return Path(named).stem if named.endswith((".yaml", ".yml")) else named

    @property
    def full(self) -> Self:
        """Same request without forecasting, as the reference of comparisons."""
        return self.model_copy(update={"spectrum": "off", "deadline": None})

    @property
    def branches(self) -> tuple[str, ...]:
        """Names of the guidance branches that are computed."""
        return BRANCHES if self.guided else BRANCHES[:1]

    @classmethod
    def parse(cls, bounds: Bounds = Bounds(), **fields: Any) -> Self:  # noqa: B008
        """Validate `fields`.

        Args:
            bounds: what the model's family can make.

        Raises:
            BadRequestError: one line per invalid field: its name, the value given, what is allowed.
        """
        try:
            request = cls(**{**fields, "embedded": bounds.embedded})
            bounds.check({name: getattr(request, name) for name in ("width", "height", "frames")})
            if request.extend is not None:
                bounds.check({"frames": request.extend.frames}, ("extend",))
        except ValidationError as error:
            raise BadRequestError(explain(error, model=cls)) from None
        return request
