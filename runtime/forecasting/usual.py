"""The preset of a request that names none: the best calibrated one that fits it, or the universal one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from runtime.errors import BadRequestError
from runtime.forecasting.presets import Preset, load_preset
from runtime.forecasting.validity import Conditions
from runtime.request.config import AUTO, Config, available
from runtime.request.sampler import SamplerConfig
from runtime.request.video_request import VideoRequest
from spectrum import MAX_STEPS, StepKind

FEW_STEPS = 4  # of which none can be forecast: distilled models jump from each to the next
_PAPER, _UNIVERSAL = "paper", "universal"
_FITS = "calibrated for this model, sampler and size"


@dataclass(frozen=True, slots=True)
class Chosen:
    """A preset that was chosen for a request.

    Attributes:
        name: its name.
        reason: why it was chosen.
    """

    name: str
    reason: str


def decided(
    config: Config, request: VideoRequest, revision: Callable[[Config], str | None]
) -> tuple[VideoRequest, str]:
    """Decide the preset of a request that leaves it open.

    Args:
        config, request: the model and the request.
        revision: gives the revision of the config's model; None if the model is not on this machine. It is
            called only where the revision matters.

    Returns:
        The request with a preset, and why it was chosen; the request itself and "" if it names one.
    """
    if request.spectrum != AUTO:
        return request, ""
    chosen = choose_preset(config, request, revision)
    return request.model_copy(update={"spectrum": chosen.name}), chosen.reason


def choose_preset(config: Config, request: VideoRequest, revision: Callable[[Config], str | None]) -> Chosen:
    """Choose a shipped preset for a request, as `decided` does.

    Of the calibrated presets that fit, and compute no more steps than the paper's, it is the one that
    computes most, and among equals the one with the highest expected PSNR. Where none fits, it is the
    universal one, and the paper's where steps are too many to plan.
    """
    listed = config.scheduler.steps

    def without(reason: str) -> Chosen:
        name = _UNIVERSAL if request.steps <= MAX_STEPS else _PAPER
        return Chosen(name, f"no calibration fits: {reason}")

    if listed is not None and listed <= FEW_STEPS:
        return Chosen("off", f"a model of {listed} steps has too few steps to forecast from")
    if config.lora:
        return without("none was made with these LoRAs")
    candidates = _calibrated(revision(config))
    if not candidates:
        return without("none was made for this model")
    if config.scheduler != SamplerConfig():
        return without("this model's is for its own sampler")
    seen, most = config.windowed(request), _paper_nfe(request.steps)
    fitting = [one for one in candidates if one.nfe <= most and not one.conditions.misfits(seen)]
    if fitting:
        return Chosen(fitting[0].name, _FITS)
    misfits = candidates[0].conditions.misfits(seen)
    return without(f"this model's is for {'; for '.join(misfits) or 'more computed steps'}")


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A calibrated preset, with the steps that it computes and the conditions that its calibration is for."""

    name: str
    nfe: int
    conditions: Conditions


@lru_cache(maxsize=16)
def _calibrated(revision: str | None) -> tuple[_Candidate, ...]:
    """The shipped presets with a calibration of a model, in the order in which they are preferred."""
    graded = []
    for name in available("spectrum"):
        preset = load_preset(name)
        calibration = preset.calibrated
        if calibration is not None and calibration.conditions.revision == revision:
            nfe, psnr = _grade(preset, calibration.conditions.steps)
            graded.append((-nfe, -psnr, _Candidate(name, nfe, calibration.conditions)))
    return tuple(one for *_, one in sorted(graded, key=lambda grade: grade[:2]))


def _grade(preset: Preset, steps: int) -> tuple[int, float]:
    """Number of steps that a preset computes, and its expected PSNR; 0 if that is not known."""
    kinds = preset.expected_kinds(steps)
    computed = [step for step, kind in enumerate(kinds) if kind is StepKind.COMPUTE]
    return len(computed), preset.expectation(steps, computed, {}, {}, []).psnr or 0.0


@lru_cache(maxsize=64)
def _paper_nfe(steps: int) -> int:
    """Number of steps that the paper's preset computes; 0 if it does not fit so many steps."""
    try:
        return load_preset(_PAPER).expected_kinds(steps).count(StepKind.COMPUTE)
    except (BadRequestError, ValueError):
        return 0
