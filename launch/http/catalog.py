"""Catalogue of a server: the models, presets and LoRAs that clients choose by name, never by path."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

from launch.http.errors import ApiError
from launch.http.profiles import revision_of
from launch.http.video import NAME_LETTERS, is_name
from runtime.errors import BadRequestError
from runtime.files.checks import refusing
from runtime.files.text import user_path
from runtime.forecasting.calibration import Calibration, load_calibration
from runtime.forecasting.presets import load_preset
from runtime.models.configs import open_config
from runtime.request.config import DEFAULT, Config, available, is_path
from runtime.request.video_request import VideoRequest

_Thing = TypeVar("_Thing")


@dataclass(frozen=True, slots=True)
class Offered:
    """A model that clients may choose: a config, or a model with the settings that are usual for it.

    Attributes:
        config: shipped name or absolute path.
        model: folder, repository or embedded model.
        revision: commit or tag of the repository.
    """

    config: str | None = None
    model: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        return self.config or self.model or ""

    def open(self) -> Config:
        """Open its config."""
        return open_config(self.config, model=self.model, revision=self.revision)


@dataclass(frozen=True, slots=True)
class Catalog:
    """Models, presets and LoRAs that clients may choose.

    Attributes:
        models: by name; the first is the default.
        presets: name → preset, likewise.
        loras: name → absolute path of a LoRA file.
        ranks: ranks that make a video together.
    """

    models: Mapping[str, Offered]
    presets: Mapping[str, str]
    loras: Mapping[str, str]
    ranks: int = 1

    @classmethod
    def of(
        cls,
        configs: Sequence[str] = (),
        presets: Sequence[str] = (),
        loras: Iterable[tuple[str, str]] = (),
        ranks: int = 1,
        models: Sequence[str] = (),
        revision: str | None = None,
    ) -> Catalog:
        """Make a catalogue; everything in it is loaded once to check it.

        Args:
            configs: names of shipped configs, or paths; without any and without models, `wan-tiny`.
            presets: likewise; shipped presets are always offered.
            loras: names and files.
            models: folders, repositories or embedded models, with the settings that are usual for each.
            revision: commit or tag of the repository, if it is the only model.

        Raises:
            BadRequestError: one of them cannot be used, or two have the same name.
        """
        if revision is not None and len(models) != 1:
            said = f"revision: {revision!r} given with {len(models)} models; it needs one --model"
            raise BadRequestError(said)
        configs = configs if configs or models else (DEFAULT,)
        named = [(name, Offered(config=path)) for name, path in map(_named, configs)]
        named += [(_last_part(model), Offered(model=model, revision=revision)) for model in models]
        for _, offered in named:
            offered.open()
        chosen = [*dict.fromkeys([*available("spectrum"), *presets])]
        for preset in chosen:
            load_preset(preset)
        return cls(
            models=_by_name("model" if models else "config", named),
            presets=_by_name("spectrum", map(_named, chosen)),
            loras=_by_name("lora", [(name, _readable(file)) for name, file in loras]),
            ranks=ranks,
        )

    @property
    def default(self) -> str:
        """Name of the model for requests that name none."""
        return next(iter(self.models))

    def offered(self, model: str | None) -> Offered:
        """The model of this name, by default the first.

        Raises:
            ApiError: there is no such model.
        """
        name = model or self.default
        if name not in self.models:
            said = f"there is no model {name!r}; this server has {', '.join(self.models)}"
            raise ApiError(404, "model_not_found", said, param="model")
        return self.models[name]

    def preset(self, name: str) -> str:
        """Preset of this name.

        Raises:
            ApiError: there is no such preset.
        """
        return _chosen(self.presets, "spectrum", name)

    def lora(self, name: str) -> str:
        """Path of the LoRA of this name.

        Raises:
            ApiError: there is no such LoRA.
        """
        return _chosen(self.loras, "loras", name)


def _named(given: str) -> tuple[str, str]:
    """Name of a config or preset, and what to load: a shipped one by its name, a file by its path."""
    return (Path(given).stem, str(user_path(given).absolute())) if is_path(given) else (given, given)


def _last_part(model: str) -> str:
    """Name of a model: that of its folder, or of its repository without the owner."""
    return user_path(model).absolute().name


def _readable(file: str) -> str:
    """Absolute path of a LoRA file that can be read."""
    path = user_path(file).absolute()
    with refusing("lora", path), path.open("rb"):
        return str(path)


def _by_name(field: str, offered: Iterable[tuple[str, _Thing]]) -> dict[str, _Thing]:
    """What is offered under each name; refuse two of one name, and names that no client can give."""
    found: dict[str, _Thing] = {}
    for name, thing in offered:
        if not is_name(name):
            raise BadRequestError(f"{field}: {name!r} given; clients can only choose names of {NAME_LETTERS}")
        if name in found:
            given, other = str(thing), str(found[name])
            raise BadRequestError(f"{field}: {given!r} given; {other!r} has the same name, rename one")
        found[name] = thing
    return found


def _chosen(known: Mapping[str, str], param: str, name: str) -> str:
    if name not in known:
        names = ", ".join(known) or "none"
        said = f"{param}: {name!r} given; this server offers {names}"
        raise ApiError(400, "invalid_value", said, param=param)
    return known[name]


def calibrations_of(config: Config) -> list[tuple[str, Calibration]]:
    """The shipped calibrations that were measured on a config's model, as far as it lies on this machine."""
    return _measured_on(revision_of(config))


def calibration_for(config: Config, request: VideoRequest) -> Calibration | None:
    """The calibration that fits a request; None if there is none."""
    for name, calibration in calibrations_of(config):
        try:
            calibration.conditions.check_request(config.windowed(request), name)
        except BadRequestError:
            continue
        return calibration
    return None


@lru_cache(maxsize=64)
def _measured_on(revision: str | None) -> list[tuple[str, Calibration]]:
    known = [(name, load_calibration(name)) for name in available("calibrations", "json")]
    return [(name, one) for name, one in known if one.conditions.revision == revision]
