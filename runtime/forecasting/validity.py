"""What a calibration was made for, and whether something else is near enough to use it."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from runtime.errors import BadRequestError
from runtime.request.video_request import NUMBER, Guidance, StepCount, VideoRequest

_RESOLUTION = 2.0  # a video of up to so many times more or fewer pixels is of the same class

_Size = Annotated[int, Field(ge=1, le=10**6), NUMBER]


class Conditions(BaseModel):
    """Everything that a calibration depends on, beside the prompts.

    Attributes:
        model, revision: its name, and the digest of its weights; a model of this revision may have any name.
        sampler: class of the sampler.
        settings: of the sampler, as text; what only another version of it knows does not count.
        steps: of the sampler.
        guidance: scale; 1 for none.
        width, height, frames: pixels; others of the same class are near enough.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    revision: str
    sampler: str
    settings: dict[str, str]
    steps: StepCount
    guidance: Guidance
    width: _Size
    height: _Size
    frames: _Size

    def check_fit(self, request: Conditions, source: str) -> None:
        """Refuse conditions that these do not stand for.

        Args:
            source: name of the calibration that was made under these.

        Raises:
            BadRequestError: what differs.
        """
        names = ["revision", "sampler", "steps", "guidance"]
        if self.revision != request.revision:
            names.insert(0, "model")
        differences = [
            f"{name} {getattr(self, name)!r}, not {getattr(request, name)!r}"
            for name in names
            if getattr(self, name) != getattr(request, name)
        ]
        if self.sampler == request.sampler:
            differences += [
                f"sampler.{name} {self.settings[name]}, not {request.settings[name]}"
                for name in sorted(self.settings.keys() & request.settings.keys())
                if self.settings[name] != request.settings[name]
            ]
        _refuse(differences + self._resolution(request.width, request.height, request.frames), source)

    def check_request(self, request: VideoRequest, source: str) -> None:
        """As `check_fit`, with what is known before a model is loaded."""
        guidance = request.guidance if request.guided else 1.0
        given = {"steps": request.steps, "guidance": guidance}
        differences = [
            f"{name} {getattr(self, name)!r}, not {value!r}"
            for name, value in given.items()
            if getattr(self, name) != value
        ]
        _refuse(differences + self._resolution(request.width, request.height, request.frames), source)

    def _resolution(self, width: int, height: int, frames: int) -> list[str]:
        own, other = self.width * self.height * self.frames, width * height * frames
        if max(own, other) <= _RESOLUTION * min(own, other):
            return []
        size, given = f"{self.width}×{self.height}×{self.frames}", f"{width}×{height}×{frames}"
        return [f"videos about as large as {size}, not {given}"]


def _refuse(differences: list[str], source: str) -> None:
    if differences:
        raise BadRequestError(
            f"spectrum: the calibration {source!r} does not fit this request; "
            f"it is for {'; for '.join(differences)}. `lockstep calibrate` makes one that fits"
        )
