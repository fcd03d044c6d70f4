"""Recipes: everything that a video is a function of, with one digest, and in words how two of them differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from runtime.errors import BadRequestError
from runtime.files.text import flatten
from runtime.forecasting.presets import Preset
from runtime.request.config import Config
from runtime.request.video_request import VideoRequest
from runtime.versions import code_version

_AFTER_LATENTS = ("tiles", "fps")  # what only decoding and writing depend on
_SHOWN = 5  # differences that are told
_LONGEST = 60  # characters of a value that are shown


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that a video is a function of.

    Ranks and their arrangement are not among it: they change a result by rounding alone, and a job may be
    resumed on others. Nor is what says how long a job may take, or where its weights and histories are.

    Attributes:
        parts: JSON, by name; what is not known is left out.
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
        revision: str | None = None,
        sampler: Mapping[str, str] | None = None,
    ) -> Self:
        """The recipe of a request.

        Args:
            image: digest of its image; None if it has none.
            revision: of the model with its LoRA files; None if the model is not here.
            sampler: class and settings of the sampler, where the model's are known.
        """
        parts = {
            # A preset's name says nothing, what it stands for does; with more time it is the same request.
            "request": request.model_dump(mode="json", exclude={"spectrum", "deadline", "image"}),
            "image": image or "",
            "preset": preset.identity,
            "model": revision,
            "dtype": config.dtype.model_dump(),
            "sampler": None if sampler is None else dict(sampler),
            "window": _window(config, request),
            "attention": config.attention,
            "compile": config.compile,
            "tiles": None if config.tiles is None else config.tiles.model_dump(),
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
        """The part that the denoised latents are a function of: a job may be resumed with other tiles."""
        return Recipe({name: value for name, value in self.parts.items() if name not in _AFTER_LATENTS})

    def check_same(self, now: Recipe) -> None:
        """Refuse to make a video from something else than was planned. What one of the two does not know is
        not compared.

        Args:
            now: the recipe as files and code are now.

        Raises:
            BadRequestError: it has changed; the message says what.
        """
        both = self.parts.keys() & now.parts.keys()
        before, after = ({name: recipe.parts[name] for name in both} for recipe in (self, now))
        if changed := differences(before, after):
            raise BadRequestError(
                f"the job was planned with something else: {some_of(changed)}. Give the request again"
            )


def _window(config: Config, request: VideoRequest) -> dict[str, int] | None:
    """How a video is made in windows; None if the model sees it whole."""
    if config.window is None or config.windowed(request) is request:
        return None
    return config.window.model_dump()


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between the parts of two recipes, field by field, in words."""
    old, new = _flat(before), _flat(now)
    return [
        f"{name} was {_shown(old.get(name), new.get(name))}, now it is {_shown(new.get(name), old.get(name))}"
        for name in dict.fromkeys([*old, *new])
        if old.get(name) != new.get(name)
    ]


def some_of(differing: list[str]) -> str:
    """The first differences as one line, and how many there are more."""
    more = f" and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
    return f"{'; '.join(differing[:_SHOWN])}{more}"


def _flat(parts: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe as one level; a request's fields as users know them."""
    return {name.removeprefix("request."): value for name, value in flatten(parts).items()}


def _shown(value: Any, other: Any) -> str:
    """A value; if it is long, from a little before where it differs from another."""
    text = repr(value)
    pairs = enumerate(zip(text, repr(other), strict=False))
    common = next((at for at, (one, two) in pairs if one != two), len(text))
    begin = max(0, min(common - _LONGEST // 2, len(text) - _LONGEST))
    cut = text[begin : begin + _LONGEST]
    return f"{'…' if begin else ''}{cut}{'…' if begin + len(cut) < len(text) else ''}"
