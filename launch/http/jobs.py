"""Makes the job of a video that a client asks for."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from launch.http.assets import LATENTS
from launch.http.beginnings import Before
from launch.http.catalog import Catalog, calibrations_of
from launch.http.errors import ApiError
from launch.http.profiles import extensible, profile_of, revision_of
from launch.http.video import VideoCreate
from runtime.errors import BadRequestError
from runtime.files.atomic import whole_file
from runtime.forecasting.calibration import Calibration
from runtime.forecasting.methods import Choice, Methods
from runtime.jobs.job import Job
from runtime.jobs.options import JobOptions
from runtime.request.config import Config

_MOST_TIMES = 16  # of the pixels and frames that a config makes by default
_MOST_STEPS = 200


@dataclass(frozen=True, slots=True)
class JobMaker:
    """Makes jobs from what a catalogue offers.

    Attributes:
        catalog: what clients may choose.
        presets: folder for the presets that are planned for a budget.
    """

    catalog: Catalog
    presets: Path

    def resolved(self, asked: VideoCreate) -> VideoCreate:
        """Fill in the model and the seed of a request, so that the same video can be made again."""
        model = asked.model or self.catalog.default
        seed = secrets.randbelow(2**32) if asked.seed is None else asked.seed
        return asked.model_copy(update={"model": model, "seed": seed})

    def job(
        self, asked: VideoCreate, out: Path, image: Path | None = None, before: Before | None = None
    ) -> Job:
        """Make the job of a video, checked and with absolute paths.

        Args:
            asked: the request, from `resolved`.
            out: path of the mp4.
            image: path of the image that the video starts from.
            before: the video that it extends.

        Raises:
            ApiError, BadRequestError: something in the request is not offered, or out of bounds.
        """
        offered = self.catalog.offered(asked.model)
        config = offered.open()
        fps = asked.fps or config.fps
        frames = _frames(asked, config, fps) if before is None else before.length(asked, config, fps)
        width, height = map(int, asked.size.split("x")) if asked.size else (None, None)
        wanted: dict[str, Any] = {
            "width": width,
            "height": height,
            "frames": frames,
            "steps": asked.steps,
            "guidance": asked.guidance,
            "guidance_2": asked.guidance_2,
            "negative": asked.negative,
            "seed": asked.seed,
            "deadline": asked.deadline,
            "image": None if image is None else str(image),
        }
        extend = None if before is None else str(before.file)
        wanted = {field: value for field, value in wanted.items() if value is not None}
        _check_volume(asked, config, wanted)
        spectrum = self._spectrum(asked, config, wanted)
        job = JobOptions.parse(
            config=offered.config,
            model=offered.model,
            revision=offered.revision,
            prompt=asked.prompt,
            **wanted,
            spectrum=spectrum,
            extend=extend,
            out=out,
            ranks=None if self.catalog.ranks == 1 else self.catalog.ranks,
            lora=[
                {"file": self.catalog.lora(one.name), "scale": one.scale, "expert": one.expert}
                for one in asked.loras
            ],
        ).job(revision=revision_of)
        if fps != config.fps:
            job = replace(job, config=job.config.model_copy(update={"fps": fps}))
        job = job.absolute()
        profile = profile_of(job.config)
        if profile is not None:  # others are checked when they are there
            profile.check(job.request, job.preset)
        if profile is None or extensible(profile):
            job = replace(job, outputs=replace(job.outputs, latents=out.absolute().with_name(LATENTS)))
        return job.planned(profile)

    def _spectrum(self, asked: VideoCreate, config: Config, wanted: dict[str, Any]) -> str | None:
        """The preset that was asked for, by name or by what it may cost; None for the config's."""
        if asked.spectrum is not None:
            return self.catalog.preset(asked.spectrum)
        if asked.nfe is None and asked.psnr is None:
            return None
        request = config.request(asked.prompt, **wanted)
        param = "nfe" if asked.nfe is not None else "psnr"
        problem = f"{param}: no calibration of {asked.model!r} is known here; choose a preset instead"
        for name, calibration in calibrations_of(config):
            try:
                calibration.conditions.check_request(request, name)
            except BadRequestError as error:
                problem = str(error).replace("spectrum:", f"{param}:", 1)
                continue
            return str(self._within(name, calibration, asked))
        raise ApiError(400, "invalid_value", problem, param=param)

    def _within(self, name: str, calibration: Calibration, asked: VideoCreate) -> Path:
        """Write the best preset that computes so many steps, or as few as the PSNR allows."""
        nfe, steps = asked.nfe, calibration.conditions.steps
        if nfe is not None and nfe >= steps:
            said = f"nfe: {nfe} given; it must be below the {steps} steps: spectrum off computes all"
            raise ApiError(400, "invalid_value", said, param="nfe")
        choice = _chosen(calibration, nfe, asked.psnr)
        content = {**choice.preset, "calibration": name}
        self.presets.mkdir(parents=True, exist_ok=True)
        path = self.presets / f"{choice.method}-{name}-{choice.plan.nfe}.yaml"
        if not path.exists():
            with whole_file(path) as temporary:
                temporary.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        return path


@lru_cache(maxsize=256)
def _chosen(calibration: Calibration, nfe: int | None, psnr: float | None) -> Choice:
    """The best method for a number of computed steps, or for the fewest that are expected to reach a PSNR."""
    methods = Methods(calibration)
    if nfe is not None:
        return methods.best(nfe)
    assert psnr is not None
    return methods.for_psnr(psnr)


def _frames(asked: VideoCreate, config: Config, fps: int) -> int | None:
    """Number of requested frames; None for the config's default."""
    if asked.seconds is None:
        return asked.frames
    seconds = float(asked.seconds)
    if seconds == 0:
        raise ApiError(
            400, "invalid_value", f"seconds: {asked.seconds!r} given; it must be above 0", param="seconds"
        )
    return config.bounds.nearest_frames(seconds * fps)


def _check_volume(asked: VideoCreate, config: Config, wanted: dict[str, Any]) -> None:
    """Refuse what no replica could hold: it would die of it, twice, before the request is set aside."""
    usual = config.defaults
    width, height, frames = (
        wanted.get(field, getattr(usual, field)) for field in ("width", "height", "frames")
    )
    pixels, usual_pixels = width * height, usual.width * usual.height
    if pixels * frames > _MOST_TIMES * usual_pixels * usual.frames:
        said = f"{width}×{height}×{frames}"
        normal = f"{usual.width}×{usual.height}×{usual.frames}"
        raise ApiError(
            400,
            "invalid_value",
            f"size: {said} pixels and frames given; this server makes at most {_MOST_TIMES} times {normal}",
            param="size" if pixels > _MOST_TIMES * usual_pixels else "frames" if asked.frames else "seconds",
        )
    if asked.steps is not None and asked.steps > _MOST_STEPS:
        said = f"steps: {asked.steps} given; this server allows at most {_MOST_STEPS}"
        raise ApiError(400, "invalid_value", said, param="steps")
