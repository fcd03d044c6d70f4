"""Files of configs: YAML, with paths relative to it, which may leave out what is usual for the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict

from runtime.errors import BadRequestError
from runtime.files.text import beside, is_folder, user_path
from runtime.files.yaml import YamlFile
from runtime.request.config import (
    Config,
    ModelFiles,
    ModelName,
    available,
    is_embedded,
    is_path,
    open_yaml,
)
from runtime.request.video_request import FileName


class _Named(BaseModel):
    """What a config says about which model it is for."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    model: ModelName
    revision: FileName | None = None


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """A config as it is written: it may leave out what is usual for its model.

    Attributes:
        name: name of a shipped config, or path of a YAML file.
        file: the parsed file.
    """

    name: str
    file: YamlFile

    @classmethod
    def read(cls, name: str) -> Self:
        """Read a shipped config, given by name, or a user's, given by path.

        Raises:
            BadRequestError: there is none, it is a folder, or it is not YAML.
        """
        folder = user_path(name)
        if is_folder(folder) and name not in available("."):
            raise BadRequestError(
                f"config: {name!r} given; it is a folder, {str(folder.absolute())!r}, and a config is a "
                f"YAML file. Give the folder of a model as the model: --model {name} (in Python: model=…), "
                "or `model:` in a config"
            )
        return cls(name, open_yaml(name, folder=".", field="config"))

    @property
    def is_complete(self) -> bool:
        """Whether it states the size of its videos; everything else has a default."""
        return all(self.file.has(("defaults", field)) for field in ("width", "height", "frames"))

    def named(self) -> tuple[str | ModelFiles, str | None]:
        """Model that it is for, with paths as in `config`, and its revision.

        Raises:
            BadRequestError: a field is unknown or not valid.
        """
        if self.is_complete:
            config = self.config()
            return config.model, config.revision
        if not self.file.has(("bounds",)):  # which may contradict any size
            self.config({"defaults": {"width": 16, "height": 16, "frames": 1}})
        found = self.file.parse(_Named)
        model = _model_beside(found.model, self.file.folder) if is_path(self.name) else found.model
        return model, found.revision

    def config(self, usual: Mapping[str, Any] | None = None) -> Config:
        """Parse the config; files that it names are relative to its own folder.

        Args:
            usual: fields for those that it leaves out, and for those of its `defaults`.

        Raises:
            BadRequestError: it is not valid.
        """
        config = self.file.parse(Config, usual or {})
        return _with_files_beside(config, self.file.folder) if is_path(self.name) else config


def _with_files_beside(config: Config, folder: Path) -> Config:
    """Make the paths of a config absolute, relative to `folder`."""
    changes: dict[str, Any] = {"model": _model_beside(config.model, folder)}
    changes["lora"] = tuple(one.model_copy(update={"file": beside(one.file, folder)}) for one in config.lora)
    if is_path(config.defaults.spectrum):
        preset = beside(config.defaults.spectrum, folder)
        changes["defaults"] = config.defaults.model_copy(update={"spectrum": preset})
    return config.model_copy(update=changes)


def _model_beside(model: str | ModelFiles, folder: Path) -> str | ModelFiles:
    if isinstance(model, ModelFiles):
        return model.beside(folder)
    if is_model_path(model) or (not is_embedded(model) and _may_be_in(folder, model)):
        return beside(model, folder)
    return model


def is_model_path(model: str) -> bool:
    """Return whether a model is named as a folder, in a way in which no repository is."""
    return model.startswith((".", "/", "~")) or model.endswith("/") or model.count("/") > 1


def _may_be_in(folder: Path, model: str) -> bool:
    """Return whether a model that is named like a repository may be a folder below `folder`."""
    path = Path(beside(model, folder))
    return is_folder(path) or ("/" in model and is_folder(path.parent))
