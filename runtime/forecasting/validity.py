"""Validity of a calibration: the conditions it was made for, and whether a request is near enough to them."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from runtime.errors import BadRequestError
from runtime.request.bounds import NUMBER
from runtime.request.video_request import Guidance, StepCount, VideoRequest
from spectrum.calibration import differences, sizes_differ

_Timestep = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False), NUMBER]
_UNLESS_NONE = Field(exclude_if=lambda value: value is None)
_Size = Annotated[int, Field(ge=1, le=10**6), NUMBER]


class Conditions(BaseModel):
    """Everything that a calibration depends on, beside the prompts.

    Attributes:
        model, revision: name of the model, and digest of its weights; the name may differ if the digest fits.
        sampler: class of the sampler.
        settings: settings of the sampler, as text; ones that only one of two versions has are not compared.
        steps: number of sampler steps.
        guidance: guidance scale; 1 for none.
        pipeline: class of the pipeline of diffusers that the calibration was made with; None if it was none.
        guidance_2, boundary: of a model of two experts, the scale of the second, and the timestep below which
            it takes over; None for other models.
        width, height, frames: size in pixels and frames; sizes of the same class are near enough.
        latents: numbers in the latents; None if they follow from the size.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    revision: str
    sampler: str
    settings: dict[str, str]
    steps: StepCount
    guidance: Guidance
    pipeline: Annotated[str | None, _UNLESS_NONE] = None
    guidance_2: Annotated[Guidance | None, _UNLESS_NONE] = None
    boundary: Annotated[_Timestep | None, _UNLESS_NONE] = None
    width: _Size
    height: _Size
    frames: _Size
    latents: Annotated[Annotated[int, Field(ge=1), NUMBER] | None, _UNLESS_NONE] = None

    def check_fit(self, request: Conditions, source: str) -> None:
        """Refuse a request whose conditions differ from these.

        Args:
            request: conditions of the request.
            source: name of the calibration that was made under these conditions.

        Raises:
            BadRequestError: conditions differ; the message says which.
        """
        found = differences(dict(self), dict(request))
        _refuse(found + self._resolution(request.width, request.height, request.frames), source)

    def check_request(self, request: VideoRequest, source: str) -> None:
        """Check a request as `check_fit` does, as far as is possible before a model is loaded."""
        _refuse(self.misfits(request), source)

    def misfits(self, request: VideoRequest) -> list[str]:
        """Describe what `check_request` refuses; empty if the request fits."""
        given = {"steps": request.steps, "guidance": request.scale}
        if self.guidance_2 is not None:
            given["guidance_2"] = request.second_scale
        found = differences({name: getattr(self, name) for name in given}, given)
        return found + self._resolution(request.width, request.height, request.frames)

    def _resolution(self, width: int, height: int, frames: int) -> list[str]:
        if not sizes_differ(self.width * self.height * self.frames, width * height * frames):
            return []
        size, given = f"{self.width}×{self.height}×{self.frames}", f"{width}×{height}×{frames}"
        return [f"videos of about {size}, not {given}"]


def _refuse(found: list[str], source: str) -> None:
    if found:
        raise BadRequestError(
            f"spectrum: the calibration {source!r} does not fit this request; "
            f"it is for {'; for '.join(found)}. `lockstep calibrate` makes one that fits"
        )
