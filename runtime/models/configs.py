"""Configs of models: what a config leaves out is taken from the one that is usual for its model."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from runtime.errors import BadRequestError
from runtime.files.problems import explain
from runtime.models.folder import is_local, refusing_model, settings_of
from runtime.models.registry import family_in
from runtime.request.config import DEFAULT, Config, ModelFiles, available, load_config
from runtime.request.config_file import ConfigFile


def open_config(name: str | None = None, *, model: str | None = None, revision: str | None = None) -> Config:
    """Open a config, and complete it with what is usual for its model.

    Args:
        name: name of a shipped config, or path of a YAML file; by default the one that is usual for `model`,
            or `wan-tiny`.
        model: folder, Hugging Face repository or embedded model that replaces the config's.
        revision: commit or tag of the repository.

    Raises:
        BadRequestError: there is no such config or model, or the config is not valid.
    """
    given = {field: one for field, one in (("model", model), ("revision", revision)) if one is not None}
    if name is None and model is not None:
        config = _with(load_config(DEFAULT), given)  # a name that is none is refused
        config = _with(usual_config(config.model, revision), given)
    else:
        config = _with(_from_file(name or DEFAULT, model, revision), given)
    if revision is not None and is_local(config):
        raise BadRequestError(
            f"revision: {revision!r} given; {config.model_name!r} is on this machine, and only repositories "
            "have revisions"
        )
    return config


def _from_file(name: str, model: str | None, revision: str | None) -> Config:
    """Load a config, which may leave out what is usual for its model or for `model`, which replaces it."""
    file = ConfigFile.read(name)
    if file.is_complete:
        return file.config()
    own, own_revision = file.named()
    usual = usual_config(own, own_revision) if model is None else usual_config(model, revision)
    return file.config(usual.model_dump(exclude={"model", "revision"}))


def _with(config: Config, given: dict[str, Any]) -> Config:
    """Replace a config's model, or its revision: that of another model is not kept."""
    if "model" in given:
        given = {"revision": None, **given}
    try:
        return Config.model_validate({**dict(config), **given})
    except ValidationError as error:
        raise BadRequestError(explain(error, model=Config)) from None


def usual_config(model: str | ModelFiles, revision: str | None = None) -> Config:
    """The config that is usual for a model: the shipped one for it, or for models of its kind and size.

    Shipped configs that need a LoRA are usual for no model.

    Of a repository that is not on this machine, only the settings are downloaded.

    Raises:
        BadRequestError: there is no such model, or its kind is unknown.
    """
    for name in available("."):
        config = load_config(name)
        if config.model == model and not config.lora:
            return config
    path = settings_of(model, revision)
    with refusing_model(model):
        family, pipeline = family_in(path)
        return family.usual_config(path, pipeline).model_copy(update={"model": model, "revision": revision})
