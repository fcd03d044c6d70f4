"""Routes of `/v1/models`: what this server offers, with the expected time and quality of each choice."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Annotated, Literal

from fastapi import APIRouter, Path
from pydantic import BaseModel

from launch.http.auth import Caller
from launch.http.catalog import Catalog, calibration_for
from launch.http.errors import not_found
from launch.http.expected import expected_run
from launch.http.profiles import extensible, profile_of, revision_of, settings_of, written_at
from launch.http.service import TheService
from runtime.errors import BadRequestError
from runtime.forecasting.calibration import Calibration
from runtime.forecasting.methods import Methods
from runtime.forecasting.presets import load_preset
from runtime.forecasting.usual import decided
from runtime.profile import ModelProfile
from runtime.request.config import Config, Defaults
from runtime.request.video_request import VideoRequest

router = APIRouter(prefix="/v1/models", tags=["models"])

_BUDGETS = (4, 6, 8, 10, 12, 14, 16, 20, 25, 30, 40)  # computed steps


class Expected(BaseModel):
    """Expected quality and time for a number of computed steps.

    Attributes:
        nfe: computed steps.
        psnr, deviation: against the full sampler, in dB; None if the model is not calibrated for it.
        seconds: of denoising, on the machine that made the calibration.
    """

    nfe: int
    psnr: float | None = None
    deviation: float | None = None
    seconds: float | None = None


class PresetChoice(Expected):
    """A forecasting preset that fits the model's defaults."""

    id: str


class ModelDefaults(BaseModel):
    """Settings of a request that gives only a prompt."""

    size: str
    seconds: str
    frames: int
    fps: int
    steps: int
    guidance: float
    guidance_2: float | None
    negative: str
    spectrum: str


class Model(BaseModel):
    """A model, and what may be chosen with it.

    Attributes:
        created: when the newest file of the model was written on this server.
        experts: number of its transformers: with two, `guidance_2` and a LoRA's `expert` can be given.
        multiple: width and height are multiples of it.
        frame_rule: how many frames a video may have.
        presets: values of `spectrum`, for requests like the defaults.
        budgets: values of `nfe`, likewise; empty if the model is not calibrated.
        loras: values of `loras`.
        extensible: whether its videos can be extended; null for a model that is downloaded when it is used.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["lockstep"] = "lockstep"
    defaults: ModelDefaults
    experts: int
    multiple: int
    frame_rule: str
    presets: list[PresetChoice]
    budgets: list[Expected]
    loras: list[str]
    extensible: bool | None


class ModelList(BaseModel):
    """All models of the server; the first is the default."""

    object: Literal["list"] = "list"
    data: list[Model]


@router.get("")
def list_models(service: TheService, key: Caller) -> ModelList:
    """List the models of this server."""
    return ModelList(data=[_model(service.catalog, name) for name in service.catalog.models])


@router.get("/{model}")
def retrieve_model(model: Annotated[str, Path(max_length=200)], service: TheService, key: Caller) -> Model:
    """Get one model."""
    if model not in service.catalog.models:
        raise not_found("model", model)
    return _model(service.catalog, model)


def _model(catalog: Catalog, name: str) -> Model:
    offered = catalog.models[name]
    config = offered.open()
    usual, request, profile = config.defaults, config.request("x"), profile_of(config)
    spectrum, settings = decided(config, request, revision_of)[0].preset, settings_of(config)
    return Model(
        id=name,
        created=written_at(config, offered.config),
        defaults=ModelDefaults(
            size=f"{usual.width}x{usual.height}",
            seconds=f"{usual.frames / config.fps:.6g}",
            frames=usual.frames,
            fps=config.fps,
            steps=usual.steps,
            guidance=usual.guidance,
            guidance_2=usual.guidance_2,
            negative=usual.negative,
            spectrum=spectrum,
        ),
        experts=_experts(settings, usual),
        multiple=config.bounds.pixels,
        frame_rule=config.bounds.frame_rule,
        presets=[
            PresetChoice(id=id, **expected.model_dump())
            for id, preset in catalog.presets.items()
            if (expected := _of_preset(profile, settings, config, request, preset)) is not None
        ],
        budgets=list(_budgets(config, request)),
        loras=list(catalog.loras),
        extensible=None if profile is None else extensible(profile),
    )


def _experts(settings: ModelProfile | None, usual: Defaults) -> int:
    """Number of a model's transformers; where nothing is known of it, its defaults tell."""
    if settings is not None:
        return len(settings.experts)
    return 1 if usual.guidance_2 is None else 2


@lru_cache(maxsize=256)
def _of_preset(
    profile: ModelProfile | None,
    settings: ModelProfile | None,
    config: Config,
    request: VideoRequest,
    name: str,
) -> Expected | None:
    """What a preset is expected to give; None if it does not fit the request, or the model if that is here.

    Args:
        profile, settings: see `profile_of` and `settings_of`.
    """
    preset = load_preset(name)
    if preset.calibrated is not None and preset.calibrated.conditions.revision != revision_of(config):
        return None
    try:
        preset.check_request(config.windowed(request))
        if profile is not None:
            profile.check(request, preset)
        run = expected_run(settings, request, preset)
    except BadRequestError:
        return None
    calibration, nfe = calibration_for(config, request), len(run.computed)
    return Expected(
        nfe=nfe,
        psnr=run.psnr,
        deviation=run.deviation,
        seconds=None if calibration is None else run.windows * _seconds(calibration, nfe),
    )


@lru_cache(maxsize=64)
def _budgets(config: Config, request: VideoRequest) -> tuple[Expected, ...]:
    """What the best methods of several budgets are expected to give; none without a calibration."""
    calibration = calibration_for(config, request)
    return () if calibration is None else tuple(_best(calibration))


def _best(calibration: Calibration) -> Iterator[Expected]:
    methods = Methods(calibration)
    for nfe in _BUDGETS:
        if nfe < calibration.conditions.steps:
            told = methods.best(nfe).prediction
            psnr, deviation = (None, None) if told is None else (told.psnr, told.deviation)
            yield Expected(nfe=nfe, psnr=psnr, deviation=deviation, seconds=_seconds(calibration, nfe))


def _seconds(calibration: Calibration, nfe: int) -> float:
    times, steps = calibration.seconds, calibration.conditions.steps
    return nfe * times.computed + (steps - nfe) * times.forecast
