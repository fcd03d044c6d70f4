"""Where the weights of a component come from, in a file beside its `config.json` that stands for the weights.

A folder with such files is one in diffusers layout in all but its weights, which are made when they are read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ValidationError

from runtime.files.text import read_json
from runtime.models.layouts.stored import Stored
from runtime.models.layouts.weights import Component, Weight

NAME = "lockstep_weights.json"
_HASHED_WHOLE = 64 * 2**20  # bytes; of larger files the digest takes in the header and samples
_SAMPLES, _SAMPLE = 63, 2**20


@dataclass(frozen=True, slots=True)
class Sources:
    """The weights of a component, and the files that they are made from.

    Attributes:
        weights: name of each weight → how it is made.
        files: file → its size and time of change when it was listed.
    """

    weights: Mapping[str, Weight]
    files: Mapping[Path, tuple[int, int]]

    @classmethod
    def of(cls, component: Component) -> Self:
        """Describe a component's weights."""
        stored = [one for weight in component.weights.values() for one in (weight.stored, weight.scale)]
        files = dict.fromkeys(one.file.absolute() for one in stored if one is not None)
        return cls(component.weights, {file: _state(file) for file in files})

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the description in a component's folder, which `has_sources`.

        Raises:
            OSError, ValueError: it is damaged, or a file has changed since.
        """
        try:
            found = _Description.model_validate(read_json(folder / NAME))
        except ValidationError as error:
            raise ValueError(f"{folder / NAME} is damaged: {error.errors()[0]['msg']}") from None
        files = {Path(name): state for name, state in found.files.items()}
        for file, state in files.items():
            if not file.is_file():
                raise FileNotFoundError(f"{file} is missing")
            if _state(file) != state:
                raise ValueError(f"{file} has changed since it was examined")
        listed = list(files)
        return cls({name: _weight(one, listed) for name, one in found.weights.items()}, files)

    def text(self) -> str:
        """Describe them as JSON, for `read`."""
        listed = list(self.files)
        found = _Description(
            files={str(file): state for file, state in self.files.items()},
            weights={name: _described(one, listed) for name, one in self.weights.items()},
        )
        return found.model_dump_json()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the weights."""
        return {name: weight.shape for name, weight in self.weights.items()}

    def digest(self) -> str:
        """Digest of the weights, whatever the names and places of the files that they are made from."""
        listed, digest = list(self.files), hashlib.sha256()
        described = {name: _described(one, listed) for name, one in sorted(self.weights.items())}
        digest.update(json.dumps(described).encode())
        for file in listed:
            digest.update(f"{file.stat().st_size}\0".encode())
            add_content(digest, file)
        return digest.hexdigest()


def has_sources(folder: Path) -> bool:
    """Return whether a component's folder has a description in place of weights."""
    return (folder / NAME).is_file()


def add_content(digest: Any, file: Path) -> None:
    """Add the content of a file to a digest.

    A file above 64 MiB counts with its first MiB (for safetensors the header: every weight's name, dtype and
    offset) and 62 MiB more, in pieces of 1 MiB spread evenly to its end.
    """
    size = file.stat().st_size
    with file.open("rb") as handle:
        if size <= _HASHED_WHOLE:
            digest.update(handle.read())
            return
        for number in range(_SAMPLES):
            handle.seek((size - _SAMPLE) * number // (_SAMPLES - 1))
            digest.update(handle.read(_SAMPLE))


_Place = tuple[int, str, tuple[int, ...], str]  # number of the file, and the tensor in it
_Described = tuple[_Place, tuple[int, ...], tuple[int, int] | None, _Place | None]


class _Description(BaseModel):
    """Content of the file: see `Sources`."""

    files: dict[str, tuple[int, int]]
    weights: dict[str, _Described]


def _described(weight: Weight, files: list[Path]) -> _Described:
    def place(stored: Stored) -> _Place:
        return files.index(stored.file.absolute()), stored.key, stored.shape, stored.dtype

    scale = None if weight.scale is None else place(weight.scale)
    return place(weight.stored), weight.shape, weight.rows, scale


def _weight(described: _Described, files: list[Path]) -> Weight:
    def stored(place: _Place) -> Stored:
        number, key, shape, dtype = place
        return Stored(files[number], key, shape, dtype)

    tensor, shape, rows, scale = described
    return Weight(stored(tensor), shape, rows, None if scale is None else stored(scale))


def _state(file: Path) -> tuple[int, int]:
    state = file.stat()
    return state.st_size, state.st_mtime_ns
