"""Catalogue of a server: the models, presets and LoRAs that clients choose by name, never by path."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from launch.http.errors import ApiError
from launch.http.profiles import revision_of
from launch.http.video import NAME_LETTERS, is_name
from runtime.errors import BadRequestError
from runtime.files.checks import refusing
from runtime.files.text import user_path
from runtime.forecasting.calibration import Calibration, load_calibration
from runtime.forecasting.presets import load_preset
from runtime.models.configs import open_config
from runtime.request.config import Config, available, is_path
from runtime.request.video_request import VideoRequest


@dataclass(frozen=True, slots=True)
class Catalog:
    """Models, presets and LoRAs that clients may choose.

    Attributes:
        models: name → config, by its shipped name or its absolute path; the first is the default.
        presets: name → preset, likewise.
        loras: name → absolute path of a LoRA file.
        ranks: ranks that make a video together.
    """

    models: Mapping[str, str]
    presets: Mapping[str, str]
    loras: Mapping[str, str]
    ranks: int = 1

    @classmethod
    def of(
        cls,
        configs: Sequence[str],
        presets: Sequence[str] = (),
        loras: Iterable[tuple[str, str]] = (),
        ranks: int = 1,
    ) -> Catalog:
        """Make a catalogue; everything in it is loaded once to check it.

        Args:
            configs: names of shipped configs, or paths.
            presets: likewise; shipped presets are always offered.
            loras: names and files.

        Raises:
            BadRequestError: one of them cannot be used, or two have the same name.
        """
        for config in configs:
            open_config(config)
        chosen = [*dict.fromkeys([*available("spectrum"), *presets])]
        for preset in chosen:
            load_preset(preset)
        return cls(
            models=_by_name("config", map(_named, configs)),
            presets=_by_name("spectrum", map(_named, chosen)),
            loras=_by_name("lora", [(name, _readable(file)) for name, file in loras]),
            ranks=ranks,
        )

    @property
    def default(self) -> str:
        """Name of the model for requests that name none."""
        return next(iter(self.models))

    def config(self, model: str | None) -> str:
        """Config of the model of this name.

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


def _readable(file: str) -> str:
    """Absolute path of a LoRA file that can be read."""
    path = user_path(file).absolute()
    with refusing("lora", path), path.open("rb"):
        return str(path)


def _by_name(field: str, offered: Iterable[tuple[str, str]]) -> dict[str, str]:
    """What is offered under each name; refuse two of one name, and names that no client can give."""
    found: dict[str, str] = {}
    for name, thing in offered:
        if not is_name(name):
            raise BadRequestError(f"{field}: {name!r} given; clients can only choose names of {NAME_LETTERS}")
        if name in found:
            raise BadRequestError(f"{field}: {thing!r} given; {found[name]!r} has the same name, rename one")
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
