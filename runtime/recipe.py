"""Recipes: everything that a video is a function of, with one digest, and how two of them differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from runtime.errors import BadRequestError
from runtime.files.text import flatten
from runtime.forecasting.presets import Preset
from runtime.request.config import Config, Tiles
from runtime.request.video_request import VideoRequest
from runtime.versions import code_version

_AFTER_LATENTS = ("tiles", "fps")  # parts on which only decoding and writing depend
_SHOWN = 5  # differences that are listed
_LONGEST = 60  # characters of a value that are shown


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that a video is a function of.

    Ranks and their arrangement are not part of it: they change a result by rounding alone, and a job may be
    resumed on others. Nor are time limits, or where weights and histories are kept.

    Attributes:
        parts: parts of the recipe, as JSON, by name; unknown ones are left out.
    """

    parts: dict[str, Any]

    @classmethod
    def of(
        cls,
        config: Config,
        request: VideoRequest,
        preset: Preset,
        *,
        image: str | None,
        extended: str | None = None,
        revision: str | None = None,
        sampler: Mapping[str, str] | None = None,
    ) -> Self:
        """Make the recipe of a request.

        Args:
            config, request, preset: the model, the request, and its preset.
            image: digest of the request's image; None without one.
            extended: digest of the latents of the video that it extends; None without one.
            revision: revision of the model with its LoRA files; None if the model is not on this machine.
            sampler: class and settings of the sampler; None if the model is not on this machine.
        """
        parts = {
            # A preset counts by its content, not its name; with another deadline it is the same request.
            "request": request.model_dump(mode="json", exclude={"spectrum", "deadline", "image", "extend"}),
            "image": image or "",
            "extended": extended or "",
            "preset": preset.identity,
            "model": revision,
            "dtype": config.dtype.model_dump(),
            "sampler": None if sampler is None else dict(sampler),
            "window": _window(config, request),
            "attention": _attention(config),
            "compile": config.performs.compile,
            "fuse_projections": config.performs.fuse_projections,
            "fuse_forecasts": config.performs.fuse_forecasts,
            "batch_guidance": config.performs.batch_guidance,
            "quantization": config.performs.quantization,
            "tiles": _tiles(config),
            "fps": config.fps,
            "code": code_version(),
        }
        unknown = [name for name, value in (("model", revision), ("sampler", sampler)) if value is None]
        known = {name: value for name, value in parts.items() if name not in unknown}
        return cls(json.loads(json.dumps(known)))

    @property
    def text(self) -> str:
        """Canonical JSON: the same text for the same recipe, in every process."""
        return json.dumps(self.parts, sort_keys=True)

    @property
    def digest(self) -> str:
        """SHA-256 of `text`, hexadecimal."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def latents(self) -> Recipe:
        """Recipe of the denoised latents alone: a job may be resumed with other tiles."""
        return Recipe({name: value for name, value in self.parts.items() if name not in _AFTER_LATENTS})

    def check_same(self, now: Recipe) -> None:
        """Refuse a job whose recipe has changed since it was planned.

        Parts that one of the two recipes lacks are not compared.

        Args:
            now: the recipe of the current files and code.

        Raises:
            BadRequestError: the recipe has changed; the message says how.
        """
        both = self.parts.keys() & now.parts.keys()
        before, after = ({name: recipe.parts[name] for name in both} for recipe in (self, now))
        if changed := differences(before, after):
            raise BadRequestError(
                f"the job has changed since it was planned: {some_of(changed)}. Submit the request again"
            )


def _attention(config: Config) -> str | dict[str, str]:
    """Name of the attention kernel; of an added one with the identity of its code."""
    if config.attention == "auto":  # without the kernels, which take seconds to import
        return "fastest" if config.performs.fastest_attention else "auto"
    from runtime.parallel.kernels import added_source

    source = added_source(config.attention)
    return config.attention if source is None else {"kernel": config.attention, "source": source}


def _tiles(config: Config) -> dict[str, Any] | None:
    """Tiles of decoding, which leave seams; None for whole frames and strips, which differ by rounding."""
    tiles = (config.tiles or Tiles()).model_dump()
    match config.decoding:
        case "tiles":
            return tiles
        case "auto":
            return {"auto": tiles}
        case _:
            return None


def _window(config: Config, request: VideoRequest) -> dict[str, int] | None:
    """Window settings that a request uses; None if the model sees the video as a whole."""
    if config.window is None or config.windowed(request) is request:
        return None
    return config.window.model_dump()


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Describe the differences between the parts of two recipes, field by field."""
    old, new = _flat(before), _flat(now)
    return [
        f"{name} was {_shown(old.get(name), new.get(name))}, now it is {_shown(new.get(name), old.get(name))}"
        for name in dict.fromkeys([*old, *new])
        if old.get(name) != new.get(name)
    ]


def some_of(differing: list[str]) -> str:
    """Join the first few differences into one line, with the number of the others."""
    more = f" and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
    return f"{'; '.join(differing[:_SHOWN])}{more}"


def _flat(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten a recipe to one level, with a request's fields named as users know them."""
    return {name.removeprefix("request."): value for name, value in flatten(parts).items()}


def _shown(value: Any, other: Any) -> str:
    """Show a value; a long one from a little before the point where it differs from `other`."""
    text = repr(value)
    pairs = enumerate(zip(text, repr(other), strict=False))
    common = next((at for at, (one, two) in pairs if one != two), len(text))
    begin = max(0, min(common - _LONGEST // 2, len(text) - _LONGEST))
    cut = text[begin : begin + _LONGEST]
    return f"{'…' if begin else ''}{cut}{'…' if begin + len(cut) < len(text) else ''}"
