"""Bounds of a request: limits of a model family, beyond those of every request."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError


def _no_truth_value(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be a number")  # noqa: TRY004 pydantic takes no TypeError
    return value


NUMBER = BeforeValidator(_no_truth_value)  # Python accepts true as 1

_Step = Annotated[int, Field(ge=1, le=8192), NUMBER]


class Bounds(BaseModel):
    """Limits of the videos that a model family can make.

    A config states those of its model's family, or narrower ones of its model, so that requests can be
    refused before the model is downloaded. The defaults are Wan's.

    Attributes:
        pixels: width and height must be multiples of this.
        frames: a video must have k · `frames` + 1 frames.
        most_frames: largest number of frames; 1 for a family that makes images.
        guidance: `branches` for classifier-free guidance, which joins two of them; `embedded` if the scale is
            an input of the transformer, which then has a single branch.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    pixels: _Step = 16
    frames: _Step = 4
    most_frames: _Step = 4001
    guidance: Literal["branches", "embedded"] = "branches"

    @property
    def embedded(self) -> bool:
        """True if the guidance scale is an input of the transformer."""
        return self.guidance == "embedded"

    @property
    def frame_rule(self) -> str:
        """Formula of the allowed numbers of frames, such as `4k + 1`."""
        return f"{self.frames}k + 1"

    def within(self, others: Bounds) -> bool:
        """Return whether everything that these bounds allow is allowed by `others`, too."""
        return (
            self.guidance == others.guidance
            and self.pixels % others.pixels == 0
            and self.frames % others.frames == 0
            and self.most_frames <= others.most_frames
        )

    def nearest_frames(self, frames: float) -> int:
        """Return the allowed number of frames that is nearest to `frames`."""
        return max(round((frames - 1) / self.frames), 0) * self.frames + 1

    def check(self, fields: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> None:
        """Refuse a width, a height or a number of frames that is out of bounds.

        Args:
            fields: fields of a request by name; others may be missing.
            prefix: path of the fields in their file, for the message.

        Raises:
            ValidationError: one line for each field that is out of bounds.
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
        """Yield each field that is out of bounds, with what is allowed."""
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
