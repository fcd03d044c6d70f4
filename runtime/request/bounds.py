"""Bounds of a request: what a model family can make, beyond what every request must be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError


def _no_truth_value(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be a number")  # noqa: TRY004 pydantic takes no TypeError
    return value


NUMBER = BeforeValidator(_no_truth_value)  # Python takes true for 1

_Step = Annotated[int, Field(ge=1, le=8192), NUMBER]


class Bounds(BaseModel):
    """What a model family can make. Every family has its own; a config states those of its model's family,
    so that a request can be refused before the model is there. The defaults are Wan's.

    Attributes:
        pixels: width and height are multiples of it.
        frames: a video has k · `frames` + 1 frames.
        most_frames: a video has at most so many; 1 for a family that makes images.
        guidance: whether the guidance scale joins two `branches` (classifier-free guidance), or is
            `embedded`: an input of the transformer, which then has one branch.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    pixels: _Step = 16
    frames: _Step = 4
    most_frames: _Step = 4001
    guidance: Literal["branches", "embedded"] = "branches"

    @property
    def embedded(self) -> bool:
        """Whether the guidance scale is an input of the transformer."""
        return self.guidance == "embedded"

    @property
    def frame_rule(self) -> str:
        """How many frames a video may have, in words."""
        return f"{self.frames}k + 1"

    def nearest_frames(self, frames: float) -> int:
        """The number of frames nearest to `frames` that a video can have."""
        return max(round((frames - 1) / self.frames), 0) * self.frames + 1

    def check(self, fields: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> None:
        """Refuse a width, a height or a number of frames that the family cannot make.

        Args:
            fields: the request's, those that are there.
            prefix: of the fields' places, for the message.

        Raises:
            ValidationError: one line for each field that is out of its bounds.
        """
        lines = [
            InitErrorDetails(
                type=PydanticCustomError("bounds", "{said}", {"said": said}),
                loc=(*prefix, name),
                input=fields[name],
            )
            for name, said in self._problems(fields)
        ]
        if lines:
            raise ValidationError.from_exception_data("VideoRequest", lines)

    def _problems(self, fields: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """Each field that is out of its bounds, and what is allowed."""
        for name in ("width", "height"):
            given = fields.get(name)
            if given is not None and given % self.pixels:
                low = given // self.pixels * self.pixels
                yield (
                    name,
                    f"must be a multiple of {self.pixels}; the nearest are {low or self.pixels} "
                    f"and {low + self.pixels}",
                )
        frames = fields.get("frames")
        if frames is None:
            return
        if frames > self.most_frames:
            yield "frames", f"must be at most {self.most_frames}"
        elif (frames - 1) % self.frames:
            low = max((frames - 1) // self.frames * self.frames + 1, 1)
            yield "frames", f"must be {self.frame_rule}; the nearest are {low} and {low + self.frames}"
