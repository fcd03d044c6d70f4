"""Profile of a model: its settings, from which requests are checked before its weights are loaded."""

from __future__ import annotations

from copy import copy
from typing import Any, Self

import torch
from diffusers import SchedulerMixin

from runtime.errors import BadRequestError
from runtime.forecasting.presets import Preset, load_preset
from runtime.forecasting.streams import STREAM_TRAITS
from runtime.forecasting.usual import FEW_STEPS, decided
from runtime.forecasting.validity import Conditions
from runtime.models.course import Course
from runtime.models.folder import ModelFolder, expected_family, find_model
from runtime.models.linear import coefficients
from runtime.models.sampler import begin_sampler, listed_steps, load_sampler, noise_levels, sampler_settings
from runtime.recipe import Recipe
from runtime.request.config import Config
from runtime.request.video_request import VideoRequest
from spectrum.solver import Multistep


class ModelProfile:
    """A model's settings, against which requests are checked.

    Args:
        config: config that names the model.

    Attributes:
        folder: folder of the model.
        family, sizes: its family, and the sizes of its latents.
        experts: settings of its transformers, in the order of their steps; missing ones, too.
        sampler: its sampler, without timesteps; see `fresh_sampler`.

    Raises:
        BadRequestError: the model is missing, incomplete or not supported.
    """

    def __init__(self, config: Config):
        self.config = config
        self.folder = find_model(config)
        self.family = self.folder.family
        self.sizes = self.family.sizes(self.folder)
        self.experts = self.family.experts(self.folder)
        self.sampler = load_sampler(self.folder, config.scheduler, self.family.timesteps)

    def with_loras(self, folder: ModelFolder) -> Self:
        """The profile of the same model with other LoRAs.

        Args:
            folder: the model, with the LoRAs that it is to have.
        """
        changed = copy(self)
        changed.folder = folder
        lora = tuple(one.lora for one in folder.loras)
        changed.config = self.config.model_copy(update={"lora": lora})
        return changed

    def decided(self, request: VideoRequest) -> tuple[VideoRequest, str]:
        """Decide the preset of a request that leaves it open; see `forecasting.usual.decided`."""
        return decided(self.config, request, lambda _: self.folder.revision)

    def check(self, request: VideoRequest, preset: Preset | None = None) -> Preset:
        """Check that the model can serve a request, on any number of ranks; return its preset, made for it.

        Args:
            request: the request.
            preset: its preset, if it has been loaded already; by default the one that it names or gets.

        Raises:
            BadRequestError: it cannot; the message says why.
        """
        if problem := self.family.refuses(self.folder, request):
            raise BadRequestError(problem)
        preset = preset or load_preset(self.decided(request)[0].spectrum)
        self._check_steps(request, preset)
        sampler = self.fresh_sampler(request)
        preset = preset.at(noise_levels(sampler))
        fresh = self._fresh(sampler, preset)
        preset.check_fit(self.conditions(request, sampler))
        preset.schedules_of(len(sampler.timesteps), request.branches, fresh)
        if request.deadline is not None and not preset.forecasts:
            raise BadRequestError(
                f"deadline: {request.deadline:g} given; {request.spectrum!r} forecasts no step, "
                "so none can be dropped"
            )
        return preset

    def _check_steps(self, request: VideoRequest, preset: Preset) -> None:
        """Refuse other steps than the config lists, and forecasts among few of them."""
        choice = self.config.scheduler
        try:
            choice.check_steps(request.steps)
        except ValueError as error:
            raise BadRequestError(str(error)) from None
        if choice.steps is not None and choice.steps <= FEW_STEPS and preset.forecasts:
            raise BadRequestError(
                f"spectrum: {request.spectrum!r} given; a model of {choice.steps} steps has too few "
                "steps to forecast from: use off"
            )

    def fresh_sampler(self, request: VideoRequest, device: torch.device | None = None) -> SchedulerMixin:
        """Make a sampler with a request's timesteps, at the first of them.

        Args:
            request: the request.
            device: device of the timesteps.

        Raises:
            BadRequestError: the sampler does not support the number of steps, or the model the size.
        """
        tokens, choice = self.sizes.tokens(self.config.windowed(request)), self.config.scheduler
        sampler = type(self.sampler).from_config(self.sampler.config)
        settings = dict(self.sampler.config)
        given = self.family.timesteps(settings, request.steps, tokens) | listed_steps(choice, settings)
        begin_sampler(sampler, request.steps, device, given)
        return sampler

    def course(self, sampler: SchedulerMixin, preset: Preset) -> Course:
        """Course of a generation: the expert of each of a sampler's steps, and what becomes of histories.

        Raises:
            BadRequestError: the model lacks the expert of a step.
        """
        course = Course.of(self.experts, sampler.timesteps)
        for step, number in enumerate(course.numbers):
            if not self.experts[number].present:
                raise BadRequestError(
                    f"model: {self.folder.name!r} cannot be used: it lacks {course.name(step)}, to which "
                    f"step {step} belongs (timestep {float(sampler.timesteps[step]):g}) by its boundary_ratio"
                )
        present, crossing = [one for one in self.experts if one.present], preset.crossing
        return Course.of(present, sampler.timesteps, crossing.history, crossing.warmup)

    def fused(self, request: VideoRequest, preset: Preset) -> Multistep | None:
        """Coefficients of a request's sampler, where forecasts are fused with its steps; None where not.

        Raises:
            BadRequestError: the sampler is not linear; and as `fresh_sampler`.
        """
        forecasts = preset.forecasts and preset.stream == "guided" and preset.fitted is None
        if not forecasts or not self.config.performs.fuse_forecasts:
            return None
        return coefficients(self.fresh_sampler(request))

    def fresh(self, request: VideoRequest, preset: Preset) -> dict[int, int]:
        """Steps before which a generation drops its history, as another expert begins anew → steps from there
        on that are computed whatever the schedule says.

        Raises:
            BadRequestError: as `fresh_sampler` and `course`.
        """
        return self._fresh(self.fresh_sampler(request), preset)

    def placed(self, request: VideoRequest, preset: Preset) -> Preset:
        """A preset, made for the sampler of a request.

        Raises:
            BadRequestError: as `fresh_sampler`.
        """
        return preset.at(noise_levels(self.fresh_sampler(request)))

    def _fresh(self, sampler: SchedulerMixin, preset: Preset) -> dict[int, int]:
        return self.course(sampler, preset).fresh(outputs=STREAM_TRAITS[preset.stream].outputs)

    def recipe(
        self, request: VideoRequest, preset: Preset, image: str | None, extended: str | None = None
    ) -> Recipe:
        """Recipe of a request's video: everything that the video is a function of.

        Args:
            request: the request.
            preset: its preset.
            image: digest of its image; None or empty if it has none.
            extended: likewise, of the latents of the video that it extends.
        """
        return Recipe.of(
            self.config,
            request,
            preset,
            image=image,
            extended=extended,
            revision=self.folder.revision,
            sampler={"kind": type(self.sampler).__name__, **sampler_settings(self.sampler), **self._listed},
        )

    def conditions(self, request: VideoRequest, sampler: SchedulerMixin) -> Conditions:
        """Conditions under which a calibration for `request` is valid."""
        return Conditions(
            model=self.folder.name,
            revision=self.folder.revision,
            sampler=type(sampler).__name__,
            settings={
                name: str(value) for name, value in sorted(sampler.config.items()) if not name.startswith("_")
            }
            | self._listed,
            steps=len(sampler.timesteps),
            guidance=request.scale,
            **self._of_two_experts(request),
            width=request.width,
            height=request.height,
            frames=self.config.windowed(request).frames,
        )

    @property
    def _listed(self) -> dict[str, str]:
        """Steps that the config lists, as text; empty if it lists none."""
        listed = listed_steps(self.config.scheduler, dict(self.sampler.config))
        return {name: str(values.tolist()) for name, values in listed.items()}

    def _of_two_experts(self, request: VideoRequest) -> dict[str, Any]:
        if len(self.experts) == 1:
            return {}
        return {"guidance_2": request.second_scale, "boundary": self.experts[0].boundary}


def check_loras(config: Config) -> None:
    """Refuse LoRAs that the config's model family cannot use, before a model is downloaded or loaded.

    Raises:
        BadRequestError: a file holds no LoRA, or a part of it would not be used.
    """
    if config.lora:
        family = expected_family(config)
        for lora in dict.fromkeys(config.lora):
            family.read_lora(lora)
