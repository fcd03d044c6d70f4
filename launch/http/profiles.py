"""Profiles of the models that a server offers: read once, and again when a file of a model has changed."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from runtime.errors import BadRequestError
from runtime.models.folder import files_of, local_revision
from runtime.models.folder import settings_of as settings_folder
from runtime.profile import ModelProfile
from runtime.rehearsal.settings import RehearsedProfile, find_settings
from runtime.request.config import Config, is_path, shipped
from runtime.request.video_request import Continuation

_State = tuple[tuple[str, int, int], ...]
"""Name, size and time of each file that a model is made of."""

_MANY = 64  # models with their LoRAs that are remembered


def profile_of(config: Config) -> ModelProfile | None:
    """Profile of a config's model; None if the model is not on this machine.

    Raises:
        BadRequestError: the model is incomplete or not supported.
    """
    state = _state(config)
    return _profile(config, state) if state else None


def settings_of(config: Config) -> ModelProfile | None:
    """Profile of a config's model, also of one whose weights are not on this machine; None if nothing is
    known of it here.

    Raises:
        BadRequestError: the model is on this machine, and incomplete or not supported.
    """
    found = profile_of(config)
    if found is not None:
        return found
    try:
        return _rehearsed(config, find_settings(config))
    except BadRequestError:
        return None


def revision_of(config: Config) -> str | None:
    """Revision of a config's model, which is not checked; None if the model is not on this machine."""
    state = _state(config)
    return _revision(config, state) if state else None


def extensible(profile: ModelProfile) -> bool:
    """Whether a model's videos can be extended."""
    example = profile.config.request("x").model_copy(
        update={"image": "image.png", "extend": Continuation(file="latents.safetensors", frames=1)}
    )
    return not profile.family.refuses(profile.folder, example)


def written_at(config: Config, name: str | None) -> int:
    """When the newest file of a config's model was written; if there is no model here, its config, or what is
    known of its settings.

    Args:
        name: what the config was loaded by; None if only the model was named.
    """
    state = _state(config)
    if not state:
        if name is None:
            files = [*settings_folder(config.model, config.revision).rglob("*.json")]
        else:
            files = [Path(name) if is_path(name) else shipped(f"{name}.yaml")]
        state = tuple(_of_files(files))
    return max((nanoseconds for _, _, nanoseconds in state), default=0) // 10**9


def _state(config: Config) -> _State:
    """State of a model's files, which differs after any of them was changed; empty without a model here."""
    given = files_of(config)
    if not given:
        return ()
    files = [file for one in given for file in (sorted(one.rglob("*")) if one.is_dir() else [one])]
    return tuple(_of_files([*files, *(Path(one.file) for one in config.lora)]))


def _of_files(paths: list[Path]) -> Iterator[tuple[str, int, int]]:
    for path in paths:
        try:
            found = path.stat()
        except OSError:  # what is read afterwards says what is wrong
            continue
        yield str(path), found.st_size, found.st_mtime_ns


@lru_cache(maxsize=_MANY)
def _profile(config: Config, state: _State) -> ModelProfile:
    return ModelProfile(config)


@lru_cache(maxsize=_MANY)
def _rehearsed(config: Config, settings: tuple[Path, str]) -> ModelProfile:
    return RehearsedProfile(config)


@lru_cache(maxsize=_MANY)
def _revision(config: Config, state: _State) -> str | None:
    return local_revision(config)
