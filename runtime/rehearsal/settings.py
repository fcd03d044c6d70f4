"""Settings of a model without its weights: from its folder, the download cache, or `published`."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from diffusers import SchedulerMixin
from torch.utils._python_dispatch import _disable_current_modes

from runtime.errors import BadRequestError
from runtime.models.folder import ModelFolder, folder_digest, open_local
from runtime.models.sampler import load_sampler
from runtime.models.wan.experts import read_transformers
from runtime.models.wan.folder import ModelKind
from runtime.models.wan.settings import TextEncoderSettings, VaeSettings, WanIndex
from runtime.profile import ModelProfile
from runtime.rehearsal.published import PUBLISHED, write_settings
from runtime.request.config import Config
from runtime.request.video_request import VideoRequest

Source = Literal["folder", "cache", "published"]


class RehearsedProfile(ModelProfile):
    """Profile of a model whose weights need not be present.

    Args:
        config: config that names the model.

    Attributes:
        source: origin of the settings: a folder, the download cache, or the published settings.

    Raises:
        BadRequestError: the model's settings are unknown, or it is not supported.
    """

    def __init__(self, config: Config):
        self.config = config
        path, self.source = find_settings(config)
        try:
            kind = _kind(WanIndex.read(path / "model_index.json"))
            read_transformers(path)
            VaeSettings.read(path / "vae" / "config.json")
            TextEncoderSettings.read(path / "text_encoder" / "config.json")
        except (OSError, ValueError) as error:
            raise BadRequestError(f"model: {config.model_name!r} cannot be rehearsed: {error}") from None
        revision = folder_digest(path) if self.source == "folder" else path.name
        self.folder = ModelFolder(config.model_name, path, revision, kind)
        self.family = self.folder.family
        self.sizes = self.family.sizes(self.folder)
        self.experts = self.family.experts(self.folder)
        self.sampler = load_sampler(self.folder, config.scheduler)

    def fresh_sampler(self, request: VideoRequest, device: torch.device | None = None) -> SchedulerMixin:
        """Make a sampler as `ModelProfile` does, but with real tables, on the CPU, whatever else is fake."""
        with _disable_current_modes():
            return super().fresh_sampler(request, None)


def _kind(index: WanIndex) -> ModelKind:
    if index.pipeline not in list(ModelKind):
        raise ValueError(f"it is a {index.pipeline}; supported are {', '.join(ModelKind)}")
    return ModelKind(index.pipeline)


def find_settings(config: Config) -> tuple[Path, Source]:
    """Find the settings of a config's model without a download.

    Returns:
        A folder with the model's JSON files, and their origin.

    Raises:
        BadRequestError: the model's settings are unknown.
    """
    local = open_local(config.model)
    if local is not None:
        return local, "folder"
    assert isinstance(config.model, str)
    cached = _cached(config)
    if cached is not None:
        return cached, "cache"
    if config.model in PUBLISHED:
        return _written(config.model), "published"
    raise BadRequestError(
        f"model: {config.model!r} given; its settings are neither on this machine nor shipped with Lockstep "
        f"({', '.join(PUBLISHED)} are); give a folder in diffusers layout (its *.json files suffice)"
    )


def _cached(config: Config) -> Path | None:
    """Find the model in the download cache, with or without its weights; None if it is not there."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(
            config.model_name, "text_encoder/config.json", revision=config.revision or "main"
        )
    except HFValidationError:
        return None
    return Path(found).parent.parent if isinstance(found, str) else None


@cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    """Temporary folder that is removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="lockstep-rehearsal-")


@cache
def _written(repository: str) -> Path:
    """Write the published settings of a repository to a temporary folder, once."""
    folder = Path(_temporary().name) / repository.replace("/", "--")
    folder.mkdir()
    write_settings(repository, folder)
    return folder
