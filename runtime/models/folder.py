"""Models on disk: where they are, and whether they are complete."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from runtime.errors import BadRequestError, reason, with_files
from runtime.files.text import user_path
from runtime.models.family import Family
from runtime.models.registry import families, family_in, find_family
from runtime.request.bounds import Bounds
from runtime.request.config import EMBEDDED_MODELS, Config, embedded_models, is_embedded

_EXAMPLE = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+|[\w.-]+")


_HASHED_WHOLE = 64 * 2**20  # bytes; of larger files the revision takes in the header and samples
_SAMPLES, _SAMPLE = 63, 2**20


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A complete model in diffusers layout on this machine.

    Attributes:
        name: name that the user gave.
        path: the folder.
        revision: commit of the repository, or `sha256:…` over the folder's files; with digests of LoRAs.
        pipeline: class of its pipeline in diffusers, which determines its family.
    """

    name: str
    path: Path
    revision: str
    pipeline: str

    @property
    def family(self) -> Family:
        """Family of the model."""
        return find_family(self.pipeline)


def find_model(config: Config) -> ModelFolder:
    """Locate the config's model, download it if it is a repository, and check that its files are complete.

    Only headers and settings are read, so this is quick for any size of model.

    Raises:
        BadRequestError: there is no such model, its family is unknown or has other bounds than the config, a
            file is missing or corrupt, or a LoRA does not fit.
    """
    local = find_local(config)
    path, commit = (local, None) if local else _download(config.model, config.revision)
    try:
        family, pipeline = family_in(path)
        family.check(path, pipeline, config.architecture)
        revision = commit or folder_digest(path)
    except (OSError, ValueError, SafetensorError) as error:
        said = with_files(error) if isinstance(error, OSError) else error
        raise BadRequestError(f"model: {config.model!r} cannot be used: {said}") from None
    if family.bounds != config.bounds:
        raise BadRequestError(
            f"bounds: {_written(config.bounds)} given; {config.model!r} is of the family {family.name}, "
            f"write `bounds: {_written(family.bounds)}` in the config"
        )
    for lora in config.lora:
        revision += f"+{family.fit_lora(lora, path, pipeline)}"
    return ModelFolder(config.model, path, revision, pipeline)


def expected_family(config: Config) -> Family:
    """Family of a config's model, as far as that is known before the model is downloaded.

    A repository that is not on this machine is assumed to be of the shipped configs' family, Wan.
    """
    local = find_local(config)
    try:
        return next(families()) if local is None else family_in(local)[0]
    except (OSError, ValueError):
        return next(families())  # `find_model` tells what is wrong


def _written(bounds: Bounds) -> str:
    """Write bounds as a config has them."""
    return "{" + ", ".join(f"{name}: {value}" for name, value in bounds.model_dump().items()) + "}"


def local_revision(config: Config) -> str | None:
    """Revision of a model on this machine, which is not checked; None if it would be downloaded.

    Raises:
        BadRequestError: a LoRA cannot be read.
    """
    path = find_local(config)
    if path is None:
        return None
    family = expected_family(config)
    return "+".join([folder_digest(path), *(family.read_lora(lora) for lora in config.lora)])


def find_local(config: Config) -> Path | None:
    """Folder of an embedded model or of a model on disk; None if it has to be downloaded.

    Raises:
        BadRequestError: it is a file, or a folder that cannot be read.
    """
    name = config.model
    embedded = [EMBEDDED_MODELS / name] if is_embedded(name) else []
    for path in (*embedded, *([user_path(name)] if name else [])):
        try:
            if path.is_dir():
                return path
            if path.is_file():
                raise BadRequestError(
                    f"model: {name!r} given; it is a single file, a folder in diffusers layout is needed, "
                    f"such as the repository {_EXAMPLE}"
                )
        except OSError as error:
            raise BadRequestError(f"model: {name!r} cannot be used: {reason(error)}") from None
    return None


def _download(repository: str, revision: str | None) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    embedded = ", ".join(embedded_models())
    if not _REPOSITORY.fullmatch(repository):
        raise BadRequestError(
            f"model: {repository!r} given; there is no such folder here, and it is neither embedded "
            f"({embedded}) nor named like a Hugging Face repository, such as {_EXAMPLE}"
        )
    try:
        path = Path(
            snapshot_download(
                repository,
                revision=revision,
                allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt"],
            )
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise BadRequestError(
            f"model: {repository!r} given; it is neither embedded ({embedded}) nor a folder, "
            f"and it could not be downloaded as a Hugging Face repository: {reason(error)}"
        ) from None
    return path, path.name


def folder_digest(path: Path) -> str:
    """SHA-256 over names, sizes and contents of a folder's files.

    A file above 64 MiB counts with its name, its size, its first MiB (for safetensors the header: every
    weight's name, dtype and offset) and 62 MiB more, in pieces of 1 MiB spread evenly to its end.
    """
    digest = hashlib.sha256()
    for file in sorted(
        p for p in path.rglob("*") if p.is_file() and p.suffix in {".json", ".safetensors", ".model"}
    ):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path)}\0{size}\0".encode())
        with file.open("rb") as handle:
            if size <= _HASHED_WHOLE:
                digest.update(handle.read())
                continue
            for number in range(_SAMPLES):
                handle.seek((size - _SAMPLE) * number // (_SAMPLES - 1))
                digest.update(handle.read(_SAMPLE))
    return f"sha256:{digest.hexdigest()[:16]}"
