"""Conversion of a model in any layout into a folder in diffusers layout, one tensor at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch

from runtime.errors import BadRequestError, JobFailedError, with_files
from runtime.files.atomic import whole_file
from runtime.files.text import read_json, user_path
from runtime.models.folder import folder_digest, open_model
from runtime.models.layouts.assemble import kept_wide
from runtime.models.layouts.shards import Slot, index_text, shard_names, split, write_shard
from runtime.models.layouts.sources import NAME as DESCRIPTION
from runtime.models.layouts.sources import Sources, has_sources
from runtime.models.layouts.stored import TensorReader, stored_in
from runtime.models.layouts.target import MANIFEST, Target
from runtime.models.layouts.weights import FLOATS, Weight, whole
from runtime.models.registry import family_in
from runtime.request.config import ModelFiles

_LARGEST = 4 * 2**30  # bytes of a weight file
_BLOCK = 2**22  # bytes that are read at a time to verify a file
_IN_DTYPE = ("transformer", "transformer_2", "text_encoder")  # the others are small, and run in float32
_TEXTS = (".json", ".model", ".txt")

OnProgress = Callable[[str, int, int], None]
"""Called with what is done to which file, the bytes that this is done to so far, and those of all files."""


@dataclass(frozen=True, slots=True)
class _File:
    """A weight file that is to be written.

    Attributes:
        name: path in the folder.
        slots: its tensors.
        weights: how they are made.
    """

    name: str
    slots: Sequence[Slot]
    weights: Mapping[str, Weight]

    @property
    def size(self) -> int:
        """Size of its tensors in bytes."""
        return sum(slot.size for slot in self.slots)


@dataclass(frozen=True, slots=True)
class Survey:
    """A model that was checked, and the files that it would be in diffusers layout.

    Attributes:
        source: folder of the model in diffusers layout, or one that stands for it.
        revision: revision of the model.
        texts: path in diffusers layout → content of the small files.
        files: the weight files.
    """

    source: Path
    revision: str
    texts: Mapping[str, bytes]
    files: Sequence[_File]

    @property
    def size(self) -> int:
        """Size of all weights in bytes."""
        return sum(file.size for file in self.files)


@dataclass(frozen=True, slots=True)
class Conversion(Survey):
    """A conversion of a model.

    Attributes:
        target: the folder that is made.
    """

    target: Target

    def run(self, on_progress: OnProgress = lambda *_: None) -> None:
        """Make the folder; go on from what an interrupted run has finished.

        Raises:
            BadRequestError: another process converts a model into the folder.
            JobFailedError: the model changed meanwhile, or the disk is full or broken.
        """
        with self.target.being_made():
            finished = self.target.finished()
            try:
                self._write(finished, on_progress)
                self._verify(finished, on_progress)
                self.target.finish(finished)
            except ValueError as error:
                raise JobFailedError(f"{self.target.folder}: {error}") from None
            except OSError as error:
                raise JobFailedError(f"{self.target.folder}: {with_files(error)}") from error

    def _write(self, finished: dict[str, str], on_progress: OnProgress) -> None:
        """Write the files that are not finished; `finished` keeps account."""
        target, done = self.target, 0
        target.keep_account(finished)
        for name, content in self.texts.items():
            target.put(name, content)
        with TensorReader() as reader:
            for file in self.files:
                if file.name not in finished:
                    finished[file.name] = self._write_one(file, reader, on_progress, done)
                    target.keep_account(finished)
                done += file.size
        if folder_digest(self.source) != self.revision:
            raise ValueError(
                "the model changed while it was being converted; start again into another folder"
            )

    def _write_one(self, file: _File, reader: TensorReader, on_progress: OnProgress, done: int) -> str:
        def make(name: str) -> torch.Tensor:
            return file.weights[name].make(reader)

        def tell(written: int) -> None:
            on_progress(f"writing {file.name}", done + written, self.size)

        path = self.target.partial / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as temporary:
            return write_shard(temporary, file.slots, make, tell)

    def _verify(self, finished: dict[str, str], on_progress: OnProgress) -> None:
        """Read the weight files again, and compare them with what was written."""
        done = 0
        for file in self.files:
            path, digest = self.target.partial / file.name, hashlib.sha256()
            with path.open("rb") as handle:
                while block := handle.read(_BLOCK):
                    digest.update(block)
            if digest.hexdigest() != finished[file.name]:
                path.unlink()
                raise ValueError(f"{file.name} is not on disk as it was written; it was removed")
            done += file.size
            on_progress(f"verifying {file.name}", done, self.size)


def survey(model: str | ModelFiles, *, dtype: str | None = None, largest: int = _LARGEST) -> Survey:
    """Check a model, and list the files that it would be in diffusers layout.

    Args:
        model: what a config's `model` may be.
        dtype: dtype of the transformers' and the text encoder's weights, but for those that are always loaded
            in float32; None keeps each as it is.
        largest: bytes of a weight file, if it does not hold a single tensor.

    Raises:
        BadRequestError: the model is missing, incomplete or not supported.
    """
    source, _ = open_model(model, None)
    try:
        family, pipeline = family_in(source)
        family.check(source, pipeline, None)
        texts, files = _texts(source), []
        for component, library, name in _components(source):
            kind = getattr(import_module(library), name)
            own, index = _files(source / component, kind, dtype if component in _IN_DTYPE else None, largest)
            files += own
            texts |= index
        return Survey(source, folder_digest(source), texts, files)
    except (OSError, ValueError) as error:
        said = with_files(error) if isinstance(error, OSError) else error
        raise BadRequestError(f"model: {str(model)!r} cannot be used: {said}") from None


def plan_conversion(
    model: str | ModelFiles, folder: Path, *, dtype: str | None = None, largest: int = _LARGEST
) -> Conversion:
    """Check a model, and plan its conversion; nothing is written.

    Args:
        model, dtype, largest: see `survey`.
        folder: folder that is to be made.

    Raises:
        BadRequestError: the model is missing, incomplete or not supported; or the folder is within it.
    """
    found = survey(model, dtype=dtype, largest=largest)
    source, revision, texts, files = found.source, found.revision, found.texts, found.files
    _refuse_inside(folder, [source, user_path(model)] if isinstance(model, str) else [source])
    sizes = {name: len(content) for name, content in texts.items()} | {one.name: one.size for one in files}
    target = Target(folder.absolute(), {"revision": revision, "dtype": dtype}, sizes)
    return Conversion(source, revision, texts, files, target)


def _refuse_inside(folder: Path, models: Sequence[Path]) -> None:
    """Refuse a folder within the model, which would be looked into for weights from then on.

    Raises:
        BadRequestError: it is.
    """
    for model in models:
        if folder.resolve() != model.resolve() and folder.resolve().is_relative_to(model.resolve()):
            raise BadRequestError(f"folder: {str(folder)!r} given; it is in the model {str(model)!r}")


def _texts(source: Path) -> dict[str, bytes]:
    """Files beside the weights, as they are."""
    return {
        str(path.relative_to(source)): path.read_bytes()
        for path in sorted(source.rglob("*"))
        if path.is_file()
        and path.suffix in _TEXTS
        and not path.name.endswith(".safetensors.index.json")
        and path.name not in (DESCRIPTION, MANIFEST)
    }


def _components(source: Path) -> Iterator[tuple[str, str, str]]:
    """Components that have weights, with the library and the class of each."""
    for name, kind in read_json(source / "model_index.json").items():
        if isinstance(kind, list) and all(kind) and (source / name / "config.json").is_file():
            yield name, *kind


def _files(folder: Path, kind: type, dtype: str | None, largest: int) -> tuple[list[_File], dict[str, bytes]]:
    """Plan the weight files of a component, and their index if there are several."""
    component, stem = folder.name, _stem(kind)
    weights = _weights(folder, stem)
    wide = frozenset() if dtype is None else kept_wide(kind, getattr(torch, dtype))
    slots = [Slot(name, _stored_dtype(name, one, dtype, wide), one.shape) for name, one in weights.items()]
    shards = split(slots, largest)
    names = shard_names(stem, len(shards))
    files = [_File(f"{component}/{name}", shard, weights) for name, shard in zip(names, shards, strict=True)]
    index = {f"{component}/{stem}.safetensors.index.json": index_text(names, shards).encode()}
    return files, index if len(shards) > 1 else {}


def _stored_dtype(name: str, weight: Weight, dtype: str | None, wide: frozenset[str]) -> str:
    if dtype is None or weight.dtype not in FLOATS:  # such as positions, which are no weights
        return weight.dtype
    return "float32" if wide.intersection(name.split(".")) else dtype


def _stem(kind: type) -> str:
    """Stem of the names of a class's weight files: diffusers' or transformers'."""
    return "diffusion_pytorch_model" if hasattr(kind, "load_config") else "model"


def _weights(folder: Path, stem: str) -> Mapping[str, Weight]:
    """How the weights of a component are made: from another layout, or as they are."""
    if has_sources(folder):
        return Sources.read(folder).weights
    index = folder / f"{stem}.safetensors.index.json"
    names = (
        sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else [f"{stem}.safetensors"]
    )
    return {key: whole(stored) for name in names for key, stored in stored_in(folder / name).items()}
