"""What a request is expected to become: its computed steps, windows and quality."""

from __future__ import annotations

from dataclasses import dataclass

from runtime.forecasting.presets import Preset
from runtime.profile import ModelProfile
from runtime.request.video_request import VideoRequest
from spectrum import NOWHERE, StepKind


@dataclass(frozen=True, slots=True)
class ExpectedRun:
    """What a request is expected to become.

    Attributes:
        steps: number of all steps.
        computed: steps that are to be computed.
        windows: number of the video's windows; 1 if it fits the model's, or the model is not known.
        psnr, deviation: against the full sampler, in dB; None without a calibration for the request.
    """

    steps: int
    computed: list[int]
    windows: int
    psnr: float | None
    deviation: float | None


def expected_run(profile: ModelProfile | None, request: VideoRequest, preset: Preset) -> ExpectedRun:
    """What a request with a preset is expected to become.

    Args:
        profile: the model, as far as it is known; see `settings_of`.

    Raises:
        BadRequestError: the model lacks the expert of a step, or the preset does not fit the request.
    """
    fresh = NOWHERE if profile is None else profile.fresh(request, preset)
    preset = preset if profile is None else profile.placed(request, preset)
    kinds = preset.expected_kinds(request.steps, fresh)
    computed = [step for step, kind in enumerate(kinds) if kind is StepKind.COMPUTE]
    told = preset.expectation(len(kinds), computed, {}, {}, [], fresh)
    windows = 1 if profile is None else len(profile.sizes.windows(request, profile.config))
    return ExpectedRun(len(kinds), computed, windows, told.psnr, told.deviation)
