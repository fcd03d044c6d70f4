"""The model that `convert` and `doctor --model` are given. Imports nothing slow."""

from __future__ import annotations

from runtime.models.folder import check_found
from runtime.request.config import ModelFiles
from runtime.request.config_file import ConfigFile


def model_of(source: str) -> str | ModelFiles:
    """Model that is named by a folder or repository, or by the YAML file of a config.

    Raises:
        BadRequestError: the config is not valid, or there is plainly no such model.
    """
    model = ConfigFile.read(source).named()[0] if source.endswith((".yaml", ".yml")) else source
    check_found(model)
    return model
