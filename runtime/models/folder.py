"""Models on disk: where they are, and whether they are complete."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from runtime.errors import BadRequestError, reason, with_files
from runtime.files.text import user_path
from runtime.models.layouts.given import Given, given_file, given_folder, parts_of
from runtime.models.layouts.sources import NAME as DESCRIPTION
from runtime.models.layouts.sources import Sources, add_content
from runtime.models.layouts.view import write_view
from runtime.models.loras import KnownLora
from runtime.models.registry import adopt, families, family_in, find_family
from runtime.models.settings import ModelIndex
from runtime.request.bounds import Bounds
from runtime.request.config import (
    EMBEDDED_MODELS,
    Config,
    Lora,
    ModelFiles,
    embedded_models,
    is_embedded,
)
from runtime.request.config_file import is_model_path

if TYPE_CHECKING:  # it takes seconds
    from runtime.models.family import Family

_EXAMPLE = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
_ORIGINAL = ("Wan2*_VAE.pth", "models_t5_*.pth", "models_clip_*.pth")  # weights of Wan's own repositories
_HASHED = "sha256:"
_SETTINGS = ("model_index.json", "*/config.json")
_WEIGHTS = ("*.json", "*.safetensors", "*.model", "*.txt", *_ORIGINAL)
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+|[\w.-]+")


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A complete model in diffusers layout on this machine.

    Attributes:
        name: name that the user gave.
        path: the folder.
        content: commit of the repository, or `sha256:…` over the folder's files.
        pipeline: class of its pipeline in diffusers, which determines its family.
        loras: LoRAs that are merged into it, in this order.
        found: the folder's files, as they were when it was found; none of a repository, which is a commit.
    """

    name: str
    path: Path
    content: str
    pipeline: str
    loras: tuple[KnownLora, ...] = ()
    found: Mapping[Path, tuple[int, ...]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def revision(self) -> str:
        """What its weights are: `content`, and the LoRAs."""
        return "+".join([self.content, *(one.word for one in self.loras)])

    @property
    def family(self) -> Family:
        """Family of the model."""
        return find_family(self.pipeline)

    def having(self, loras: Iterable[KnownLora]) -> ModelFolder:
        """The model with these LoRAs, and no others."""
        return replace(self, loras=tuple(loras))

    def with_loras(self, loras: Iterable[Lora]) -> ModelFolder:
        """The model with these LoRAs, and no others, after their files were checked.

        Raises:
            BadRequestError: one of them does not fit the model.
        """
        fit = self.family.fit_lora
        return self.having(KnownLora(one, fit(one, self.path, self.pipeline)) for one in loras)

    def check_untouched(self) -> None:
        """Refuse a model of whose files one was written or replaced since it was found; no weights are read.

        Raises:
            BadRequestError: one was.
        """
        with refusing_model(self.name):
            if self.found and _states(self.path) != self.found:
                raise ValueError("its files changed while it was loaded")

    def check_unchanged(self) -> None:
        """Refuse a model whose files are no longer those that were found.

        Raises:
            BadRequestError: they have changed. Those of a repository do not: it is a commit.
        """
        if self.content.startswith(_HASHED) and folder_digest(self.path) != self.content:
            raise BadRequestError(f"model: {self.name!r} cannot be used: its files have changed")


def find_model(config: Config) -> ModelFolder:
    """Locate the config's model, download it if it is a repository, and check that its files are complete.

    Only headers and settings are read, so this is quick for any size of model.

    Raises:
        BadRequestError: there is no such model, its family is unknown or cannot make all that the config's
            bounds allow, a file is missing or corrupt, or a LoRA does not fit.
    """
    path, commit = open_model(config.model, config.revision)
    with refusing_model(config.model):
        family, pipeline = family_in(path)
        family.check(path, pipeline, config.architecture)
        states = _states(path) if commit is None else {}
        revision = commit or folder_digest(path)
    if not config.bounds.within(family.bounds):
        raise BadRequestError(
            f"bounds: {_written(config.bounds)} given; {config.model_name!r} is of the family {family.name}, "
            f"write `bounds: {_written(family.bounds)}` in the config"
        )
    return ModelFolder(config.model_name, path, revision, pipeline, found=states).with_loras(config.lora)


def open_model(model: str | ModelFiles, revision: str | None) -> tuple[Path, str | None]:
    """Find a model's folder in diffusers layout, downloading it if it is a repository.

    For a model in another layout it is a folder that stands for it; see `runtime.models.layouts.view`.

    Returns:
        The folder, and the commit of a repository, None for a model on this machine.

    Raises:
        BadRequestError: there is no such model, or it is in no known layout.
    """
    local = open_local(model)
    if local is not None:
        return local, None
    assert isinstance(model, str)
    path, commit = _download(model, revision)
    return _in_diffusers_layout(model, path), commit


def check_found(model: str | ModelFiles) -> None:
    """Refuse a model that is plainly not there, before what takes seconds to import; nothing is downloaded.

    Raises:
        BadRequestError: there is no such folder or file, or the folder holds no model.
    """
    path = open_local(model)
    if path is not None:
        with refusing_model(model):
            ModelIndex.read(path / "model_index.json")
    elif isinstance(model, str):
        _check_repository(model)


def settings_of(model: str | ModelFiles, revision: str | None) -> Path:
    """Find a folder with the settings of a model; of a repository, no weights are downloaded unless they tell
    what it is.

    Raises:
        BadRequestError: there is no such model, or it is in no known layout.
    """
    local = open_local(model)
    if local is not None:
        return local
    assert isinstance(model, str)
    return _settings_of_repository(model, revision)


@lru_cache(maxsize=64)  # a server opens a config for every request
def _settings_of_repository(repository: str, revision: str | None) -> Path:
    path, _ = _download(repository, revision, _SETTINGS)
    return path if (path / "model_index.json").is_file() else open_model(repository, revision)[0]


def open_local(model: str | ModelFiles) -> Path | None:
    """Find the folder of a model on this machine, as `open_model` does; None if it has to be downloaded.

    Raises:
        BadRequestError: it is in no known layout, or cannot be read.
    """
    if isinstance(model, ModelFiles):
        return _view_of_files(model)
    path = _local_folder(model)
    return None if path is None else _in_diffusers_layout(model, path)


def _view_of_files(model: ModelFiles) -> Path:
    files = {name: user_path(file) for name, file in model.named.items()}
    tokenizer = files.pop("tokenizer", None)
    with refusing_model(model):
        given = Given([given_file(file, name) for name, file in files.items()], tokenizer=tokenizer)
        adopted = adopt(given)
        if adopted is None:
            raise ValueError(f"its layout is not known; found: {given.seen()}")
        return write_view(adopted)


def _in_diffusers_layout(model: str, path: Path) -> Path:
    """Return the folder, or one that stands for it; the folder, too, if it is damaged or holds no weights."""
    if any((path / name).is_file() for name in ("model_index.json", "scheduler/scheduler_config.json")):
        return path
    with refusing_model(model):
        given = given_folder(path)
        if not given.sets:
            return path
        adopted = adopt(given)
        if adopted is not None:
            return write_view(adopted)
        raise ValueError(
            f"it has no model_index.json (diffusers) and no other known layout; found: {given.seen()}"
        )


@contextmanager
def refusing_model(model: str | ModelFiles) -> Iterator[None]:
    """Turn errors about a model's files into a refusal of it.

    Raises:
        BadRequestError: the block raised one.
    """
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        said = with_files(error) if isinstance(error, OSError) else error
        raise BadRequestError(f"model: {str(model)!r} cannot be used: {said}") from None


def expected_family(config: Config) -> Family:
    """Family of a config's model, as far as that is known before the model is downloaded.

    A repository that is not on this machine is assumed to be of the shipped configs' family, Wan.
    """
    local = open_local(config.model)
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
    path = open_local(config.model)
    if path is None:
        return None
    if not config.lora:
        return folder_digest(path)  # without the family, which takes seconds to import
    family = expected_family(config)
    loras = (KnownLora(one, family.read_lora(one)).word for one in config.lora)
    return "+".join([folder_digest(path), *loras])


def is_local(config: Config) -> bool:
    """Return whether a config's model is on this machine, complete or not.

    Raises:
        BadRequestError: it is a file, or a folder that cannot be read.
    """
    return isinstance(config.model, ModelFiles) or _local_folder(config.model) is not None


def absolute_model(config: Config) -> str | ModelFiles:
    """Name a config's model for processes that run in other folders.

    Raises:
        BadRequestError: see `is_local`.
    """
    if isinstance(config.model, ModelFiles):
        return config.model.beside(Path.cwd())
    folder = None if is_embedded(config.model) else _local_folder(config.model)
    return config.model if folder is None else str(folder.absolute())


def files_of(config: Config) -> list[Path]:
    """Files and folders on this machine that a config's model is read from.

    Raises:
        BadRequestError: see `is_local`.
    """
    if isinstance(config.model, ModelFiles):
        return [part for file in config.model.named.values() for part in parts_of(user_path(file))]
    folder = _local_folder(config.model)
    return [] if folder is None else [folder]


def _local_folder(name: str) -> Path | None:
    """Folder of an embedded model or of a model on disk; None if it has to be downloaded.

    Raises:
        BadRequestError: it is a file, or a folder that cannot be read.
    """
    embedded = [EMBEDDED_MODELS / name] if is_embedded(name) else []
    for path in (*embedded, *([user_path(name)] if name else [])):
        try:
            if path.is_dir():
                return path
            if path.is_file():
                raise BadRequestError(
                    f"model: {name!r} given; it is a single file; name the files of all components, as "
                    f"docs/models.md says, or a folder or repository, such as {_EXAMPLE}"
                )
        except OSError as error:
            raise BadRequestError(f"model: {name!r} cannot be used: {reason(error)}") from None
    return None


def _check_repository(name: str) -> None:
    """Refuse a name that is of no folder if it cannot be that of a repository, either."""
    if is_model_path(name) or not _REPOSITORY.fullmatch(name):
        raise BadRequestError(
            f"model: {name!r} given; there is no folder {str(user_path(name).absolute())!r}. A model is a "
            f"folder, one that is embedded ({', '.join(embedded_models())}), or a Hugging Face repository, "
            f"such as {_EXAMPLE}"
        )


def _download(repository: str, revision: str | None, wanted: Sequence[str] = _WEIGHTS) -> tuple[Path, str]:
    _check_repository(repository)
    embedded, folder = ", ".join(embedded_models()), str(user_path(repository).absolute())
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        path = Path(
            snapshot_download(
                repository,
                revision=revision,
                allow_patterns=[*wanted],
            )
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise BadRequestError(
            f"model: {repository!r} given; it is neither embedded ({embedded}) nor a folder (there is no "
            f"{folder!r}), and it could not be downloaded as a Hugging Face repository: {reason(error)}"
        ) from None
    return path, path.name


def folder_digest(path: Path) -> str:
    """SHA-256 over names, sizes and contents of a folder's files; of large ones over samples: `add_content`.

    Descriptions of weights in another layout count with the contents of the files that they name.
    """
    digest = hashlib.sha256()
    for file in _digested(path):
        name = file.relative_to(path)
        if file.name == DESCRIPTION:
            digest.update(f"{name}\0{Sources.read(file.parent).digest()}\0".encode())
        else:
            digest.update(f"{name}\0{file.stat().st_size}\0".encode())
            add_content(digest, file)
    return f"{_HASHED}{digest.hexdigest()[:16]}"


def _digested(path: Path) -> list[Path]:
    """Files of a model that its digest is of."""
    suffixes = {".json", ".safetensors", ".model"}
    return sorted(one for one in path.rglob("*") if one.is_file() and one.suffix in suffixes)


def _states(path: Path) -> dict[Path, tuple[int, ...]]:
    """Inode, size and time of change of the files of a model.

    Raises:
        ValueError: a file that a description of weights names has changed since it was described.
    """
    found = dict[Path, tuple[int, ...]]()
    for file in _digested(path):
        if file.name == DESCRIPTION:
            Sources.read(file.parent)
        state = file.stat()
        found[file] = state.st_ino, state.st_size, state.st_mtime_ns
    return found
