"""Tensors in files: written with a clear error for a full disk, and mapped instead of read as a whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from runtime.files.atomic import PlainFile


def save_tensors(content: Any, path: Path) -> None:
    """Save tensors as `torch.save` does, but report a full disk as such.

    Raises:
        OSError: the file cannot be written.
    """
    with PlainFile(path, "w") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            raise file.error or error from None


def map_tensors(path: Path) -> Any:
    """Load a file of `save_tensors` without reading its tensors: their memory is the file, mapped.

    Copy what is kept for longer: access to a mapped tensor kills the process if the file is lost meanwhile.

    Raises:
        Exception: the file is damaged; torch and pickle raise anything.
    """
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def each_tensor(content: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Copy nested dicts and lists, with `change` applied to every tensor in them."""
    if isinstance(content, torch.Tensor):
        return change(content)
    if isinstance(content, dict):
        return {key: each_tensor(value, change) for key, value in content.items()}
    if isinstance(content, list):
        return [each_tensor(value, change) for value in content]
    return content
