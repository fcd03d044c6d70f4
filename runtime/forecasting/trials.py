"""Trials: calibration videos made again with forecasts planned or solvers fitted from all the others."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from runtime.request.bounds import NUMBER

Positive = Annotated[float, Field(gt=0, le=1e12, allow_inf_nan=False), NUMBER]
Finite = Annotated[float, Field(ge=-1e12, le=1e12, allow_inf_nan=False), NUMBER]
Share = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False), NUMBER]
Count = Annotated[int, Field(ge=0, le=10**9), NUMBER]


class FilePart(BaseModel):
    """Part of a calibration file; unknown fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Trial(FilePart):
    """A calibration video, made again with what was planned or fitted from the other calibration videos.

    Attributes:
        video: number of the video.
        nfe: number of computed steps.
        expected: expected relative error of the latent.
        surprise: how much worse the forecasts were than expected (`spectrum.surprise`).
        measured: measured relative error of the latent.
        psnr: PSNR of the frames, dB.
    """

    video: Count
    nfe: Count
    expected: Share
    surprise: Finite
    measured: Share
    psnr: Finite
