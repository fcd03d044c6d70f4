"""Tensors in weight files of any format: found by their headers, and read one at a time."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import SafetensorError, safe_open

from runtime.errors import reason

if TYPE_CHECKING:  # it takes seconds
    import torch

SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")
_INSTEAD = "use the safetensors file of the same model; fp8_scaled is about as small"
_DTYPES = {  # of safetensors' headers
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "U8": "uint8", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64",
    "BOOL": "bool",
}  # fmt: skip


class Stored(NamedTuple):
    """A tensor in a file.

    Attributes:
        file: the file.
        key: name of the tensor in it.
        shape: shape of the tensor.
        dtype: dtype, as torch names it.
    """

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str


def stored_in(file: Path) -> Mapping[str, Stored]:
    """List the tensors of a file by their names; only headers are read.

    A file of pickled tensors is read with `weights_only=True`: no code in it is run. One tensor or dictionary
    of tensors within `state_dict` counts as the file.

    Raises:
        OSError, ValueError: it is missing, damaged, or of a format that is not read.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing")
    state = file.stat()
    return _listed(file, (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns))


@lru_cache(maxsize=256)
def _listed(file: Path, state: tuple[int, ...]) -> Mapping[str, Stored]:
    """List the tensors of a file; cached for its inode, size and time alone."""
    if file.suffix == ".gguf":
        raise ValueError(f"{file} is a GGUF file, which is not read: {_INSTEAD}")
    with _opened(file) as content:
        if isinstance(content, dict):
            return {
                key: Stored(file, key, tuple(value.shape), str(value.dtype).removeprefix("torch."))
                for key, value in content.items()
            }
        return {key: _header(file, key, content.get_slice(key)) for key in content.keys()}  # noqa: SIM118


def _header(file: Path, key: str, part: Any) -> Stored:
    dtype = part.get_dtype()
    return Stored(file, key, tuple(part.get_shape()), _DTYPES.get(dtype, dtype))


class TensorReader:
    """Reads tensors, in any thread; files stay open until the block ends, and are mapped, not held in memory.

    Example:
        >>> from runtime.request.config import EMBEDDED_MODELS
        >>> file = EMBEDDED_MODELS / "wan-tiny" / "vae" / "diffusion_pytorch_model.safetensors"
        >>> stored = stored_in(file)["decoder.conv_in.bias"]
        >>> with TensorReader() as reader:
        ...     reader.read(stored).shape == stored.shape
        True
    """

    def __init__(self) -> None:
        self._open: dict[Path, tuple[Any, Any]] = {}
        self._opening = Lock()

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *_: object) -> None:
        for opened, _content in self._open.values():
            opened.__exit__(None, None, None)
        self._open.clear()

    def read(self, stored: Stored) -> torch.Tensor:
        """Read a tensor; its memory is the mapped file, so copy what is kept.

        Raises:
            OSError, ValueError: the file is damaged, or no longer holds the tensor as it was listed.
        """
        with self._opening:
            if stored.file not in self._open:
                opened = _opened(stored.file)
                self._open[stored.file] = opened, opened.__enter__()
            content = self._open[stored.file][1]
        try:
            found = content[stored.key] if isinstance(content, dict) else content.get_tensor(stored.key)
        except (KeyError, SafetensorError):
            found = None
        if found is None or tuple(found.shape) != stored.shape:
            raise ValueError(f"{stored.file} changed while it was being read: {stored.key} is different")
        tensor: torch.Tensor = found
        return tensor


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """Open a file: its tensors as a dict, or as a handle of safetensors."""
    with file.open("rb") as handle:
        if handle.read(40).startswith(b"version https://git-lfs"):
            raise ValueError(f"{file} is a Git LFS pointer, not the weights: run `git lfs pull`")
    if file.suffix != ".safetensors":
        yield _pickled(file)
        return
    try:
        opened = safe_open(file, framework="pt")  # checks that the header covers the file exactly
    except SafetensorError as error:
        raise ValueError(f"{file} is corrupt: {reason(error)}") from None
    with opened as content:
        yield content


def _pickled(file: Path) -> dict[str, torch.Tensor]:
    import torch

    from runtime.files.tensors import map_tensors

    if not zipfile.is_zipfile(file):
        raise ValueError(f"{file} is corrupt, or not written by torch.save in its format since torch 1.6")
    try:
        content = map_tensors(file)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} holds more than weights and is not read, as it could run code: {reason(error)}"
        ) from None
    except Exception as error:  # torch and pickle raise anything on a damaged file
        raise ValueError(f"{file} is corrupt: {reason(error)}") from None
    inner = content.get("state_dict") if isinstance(content, dict) else None
    tensors = inner if isinstance(inner, dict) else content
    if not isinstance(tensors, dict) or not all(isinstance(one, torch.Tensor) for one in tensors.values()):
        raise ValueError(f"{file} does not hold a dictionary of tensors")
    return {str(name): tensor for name, tensor in tensors.items()}
