"""What is known of a model before its weights are loaded, and so whether it can serve a request."""

from __future__ import annotations

import torch
from diffusers import SchedulerMixin

from runtime.errors import BadRequestError
from runtime.forecasting.presets import Preset, load_preset
from runtime.forecasting.validity import Conditions
from runtime.models.folder import expected_family, find_model
from runtime.models.sampler import begin_sampler, load_scheduler, sampler_settings
from runtime.recipe import Recipe
from runtime.request.config import Config
from runtime.request.video_request import VideoRequest


class ModelProfile:
    """A model's settings, by which requests are checked.

    Args:
        config: which model, and how it is used.

    Raises:
        BadRequestError: the model is not there, not whole or not supported.
    """

    def __init__(self, config: Config):
        self.config = config
        self.folder = find_model(config)
        self.family = self.folder.family
        self.sizes = self.family.sizes(self.folder)
        self.scheduler = load_scheduler(self.folder, config.scheduler, self.family.timesteps)

    def check(self, request: VideoRequest, preset: Preset | None = None) -> Preset:
        """Refuse a request that the model cannot serve on any ranks; return its preset.

        Args:
            preset: the request's preset, where it has been loaded already.

        Raises:
            BadRequestError: the request is refused; the message says why.
        """
        if problem := self.family.refuses(self.folder, request):
            raise BadRequestError(problem)
        preset = preset or load_preset(request.spectrum)
        sampler = self.fresh_sampler(request)
        preset.check_fit(self.conditions(request, sampler))
        preset.schedules_of(len(sampler.timesteps), request.branches)
        if request.deadline is not None and not preset.forecasts:
            raise BadRequestError(
                f"deadline: {request.deadline:g} given; {request.spectrum!r} forecasts no step, "
                "so none can be dropped"
            )
        return preset

    def fresh_sampler(self, request: VideoRequest, device: torch.device | None = None) -> SchedulerMixin:
        """The sampler with a request's timesteps set, at its beginning.

        Raises:
            BadRequestError: it cannot take so many steps, or the model cannot serve the request's size.
        """
        tokens = self.sizes.tokens(self.config.windowed(request))
        sampler = type(self.scheduler).from_config(self.scheduler.config)
        given = self.family.timesteps(dict(self.scheduler.config), request.steps, tokens)
        begin_sampler(sampler, request.steps, device, given)
        return sampler

    def recipe(self, request: VideoRequest, preset: Preset, image: str | None) -> Recipe:
        """Everything that a video of `request` is a function of.

        Args:
            image: digest of the request's image; None or empty if it has none.
        """
        return Recipe.of(
            self.config,
            request,
            preset,
            image=image,
            revision=self.folder.revision,
            sampler={"kind": type(self.scheduler).__name__, **sampler_settings(self.scheduler)},
        )

    def conditions(self, request: VideoRequest, sampler: SchedulerMixin) -> Conditions:
        """What a calibration for `request` would be made for."""
        return Conditions(
            model=self.folder.name,
            revision=self.folder.revision,
            sampler=type(sampler).__name__,
            settings={
                name: str(value) for name, value in sorted(sampler.config.items()) if not name.startswith("_")
            },
            steps=len(sampler.timesteps),
            guidance=request.scale,
            width=request.width,
            height=request.height,
            frames=self.config.windowed(request).frames,
        )


def check_loras(config: Config) -> None:
    """Refuse LoRAs that the config's kind of model cannot use, before it is fetched or loaded.

    Raises:
        BadRequestError: a file holds no LoRA, or a part of it would not be used.
    """
    if config.lora:
        family = expected_family(config)
        for lora in dict.fromkeys(config.lora):
            family.read_lora(lora)
